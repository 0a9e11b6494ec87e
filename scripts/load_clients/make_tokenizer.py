"""A tokenizer of the mock server's own words, for clients that want one on disk.

    python make_tokenizer.py FOLDER

One token per word between blanks, as the server counts. w0 ... w999 are tokens 0 ... 999, every other
word is token 0. No special tokens: nothing is added to a prompt, nothing is left out of a text.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 1000
MAX_MODEL_LEN = 2048

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
words = {f"w{number}": number for number in range(VOCABULARY)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.save(str(folder / "tokenizer.json"))
for name, fields in {
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_MODEL_LEN,
    },
    "config.json": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_MODEL_LEN,
    },
}.items():
    (folder / name).write_text(json.dumps(fields))
