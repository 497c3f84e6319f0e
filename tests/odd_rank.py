"""A process of a run whose rank 1 is not like the others, in the way the first argument says."""

import os
import sys

from senseflow.core.draws import Draws
from senseflow.engine.launch import main
from senseflow.trainer import trainer_flux_senseflow as trainer

how = sys.argv.pop(1)
if os.environ["RANK"] == "1" and how == "configuration":
    sys.argv.append("ida.lam=0.5")
if os.environ["RANK"] == "1" and how == "draws":
    alike = Draws.shared

    def shared(self, purpose):
        """Another anchor from iteration 5 on."""
        odd = purpose == "anchor" and self.iteration >= 5
        return alike(Draws(self.seed + odd, self.iteration, self.indices), purpose)

    Draws.shared = shared
main("odd_rank", trainer.RECIPE)
