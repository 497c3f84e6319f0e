"""A trainer module whose rank 1 is not like the others, in the way ODD of the environment says."""

import os
import sys

from senseflow.core.draws import Draws
from senseflow.launch.entry import main
from senseflow.trainer import trainer_flux_senseflow as trainer

how = os.environ["ODD"] if os.environ.get("RANK") == "1" else ""
if how == "configuration":
    sys.argv.append("ida.lam=0.5")
if how == "draws":
    alike = Draws.shared

    def shared(self, purpose):
        """Another anchor from iteration 5 on."""
        odd = purpose == "anchor" and self.iteration >= 5
        return alike(Draws(self.seed + odd, self.iteration, self.indices), purpose)

    Draws.shared = shared
main("odd_rank", trainer.RECIPE)
