"""The recipes that have an embedded teacher, and the YAML of each."""

from senseflow.config.recipes import RECIPES

NAMES = ("flux", "sdxl", "sd35", "sd35_large", "flux2_klein", "z_image", "qwen_image")
EMBEDDED = {name: RECIPES[name] for name in (*(f"{n}_senseflow" for n in NAMES), "sdxl_dmd2")}
YAMLS = {name: f"{recipe.configs}/{name}_tiny.yaml" for name, recipe in EMBEDDED.items()}
