"""What the graph sees. Each family of nodes has a module; the work is done in `distributed` and in diffusers."""

from .decoding import DistributedVAEDecode
from .distribute import DistributeVAE
from .loading import LoadPipeline
from .rank_group import RankGroupNode
from .sampling import Sampler
from .text import TextEncode
from .vae import LoadVAE

NODES = [LoadPipeline, LoadVAE, TextEncode, Sampler, RankGroupNode, DistributedVAEDecode, DistributeVAE]
