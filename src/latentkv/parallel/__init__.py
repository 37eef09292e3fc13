"""A model in several processes, on one machine or on several: stages of layers, shards of these, and what goes between.

torch.distributed starts the processes (torchrun) and carries what they say to each other (gloo). One of them, the
driver, has the requests, the pages, the sampler and the text; the others compute their layers and know no requests.
"""

from latentkv.parallel.memory import team_file
from latentkv.parallel.pipeline import Pipeline
from latentkv.parallel.ranks import Ranks, join
from latentkv.parallel.stage_loop import StageLoop, run_stage
from latentkv.parallel.sums import MemorySums, sums_of
from latentkv.parallel.team import ShardTeam

__all__ = ["MemorySums", "Pipeline", "Ranks", "ShardTeam", "StageLoop", "join", "run_stage", "sums_of", "team_file"]
