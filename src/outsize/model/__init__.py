"""Opening a model, cutting it into blocks, reading its weights, and writing a Hugging Face folder back.

module = open_skeleton(folder, torch.float32)   # parameters on meta, buffers real
plan = cut(module)                              # blocks, and the points where the forward needs them
source = SafetensorsSource(folder, module)      # or InitSource(module, seed), or TensorSource(tensors)
source.read(block, targets)                     # one tensor per piece
write_folder(module, plan.blocks, fetch, out)   # an ordinary folder again
"""

from outsize.model.adapter import has_adapters, write_adapters
from outsize.model.attention import attention_of, merges_rows
from outsize.model.cut import cut
from outsize.model.encoding import EncodingSource, encoded
from outsize.model.export import MAX_SHARD_BYTES, write_companions, write_folder
from outsize.model.folder import Existing
from outsize.model.initial import InitSource
from outsize.model.names import main_dtype
from outsize.model.points import Binding, Cut, Point, PointKind
from outsize.model.quantized import is_quantized, parse_weights, stored_weights
from outsize.model.shards import READ_BUFFERS_BYTES, file_digests, find_weights, has_weights
from outsize.model.skeleton import longest_sequence, open_skeleton, plain_defaults, resolve_folder
from outsize.model.source import SafetensorsSource, Source, TensorSource
from outsize.model.tokenizer import load_tokenizer, messages_for_template
from outsize.model.weight_file import FileDigest

__all__ = [
    "MAX_SHARD_BYTES",
    "READ_BUFFERS_BYTES",
    "Binding",
    "Cut",
    "EncodingSource",
    "Existing",
    "FileDigest",
    "InitSource",
    "Point",
    "PointKind",
    "SafetensorsSource",
    "Source",
    "TensorSource",
    "attention_of",
    "cut",
    "encoded",
    "file_digests",
    "find_weights",
    "has_adapters",
    "has_weights",
    "is_quantized",
    "load_tokenizer",
    "longest_sequence",
    "main_dtype",
    "merges_rows",
    "messages_for_template",
    "open_skeleton",
    "parse_weights",
    "plain_defaults",
    "resolve_folder",
    "stored_weights",
    "write_adapters",
    "write_companions",
    "write_folder",
]
