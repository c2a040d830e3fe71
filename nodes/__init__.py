"""The nodes: thin adapters with one module each. The computation is in `distributed` and in diffusers."""

from .decoding import DistributedVAEDecode
from .distribute import DistributeVAE
from .distribute_model import DistributeModel
from .loading import LoadPipeline
from .rank_group import RankGroupNode
from .sampling import Sampler
from .text import TextEncode
from .vae import LoadVAE

NODES = [
    LoadPipeline,
    LoadVAE,
    TextEncode,
    Sampler,
    RankGroupNode,
    DistributedVAEDecode,
    DistributeVAE,
    DistributeModel,
]
