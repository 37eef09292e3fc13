"""A model in several processes, on one machine or on several: stages of layers, and what goes from each to the next.

torch.distributed starts the processes (torchrun) and carries what they say to each other (gloo). One of them, the
driver, has the requests, the pages, the sampler and the text; the others compute their layers and know no requests.
"""

from latentkv.parallel.pipeline import Pipeline
from latentkv.parallel.ranks import Ranks, join
from latentkv.parallel.stage_loop import StageLoop, run_stage

__all__ = ["Pipeline", "Ranks", "StageLoop", "join", "run_stage"]
