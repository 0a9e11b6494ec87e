"""Two small Llamas to serve on a CPU: a shape and a tokenizer; an engine draws the weights at random.

    python make_tiny_models.py FOLDER

FOLDER/tiny is the fastest (2 layers of 64), for a step time that is set; FOLDER/small (4 layers of 256)
takes some 10 to 20 ms a step on one core. One token per word between blanks; w3 ... w999 are ordinary.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = 1000
MAX_MODEL_LEN = 8192
SHAPES = {"tiny": (64, 2, 2), "small": (256, 4, 4)}

words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), VOCABULARY))]
tokenizer = Tokenizer(
    models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
)
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.add_special_tokens(SPECIAL)
for name, (hidden, layers, heads) in SHAPES.items():
    folder = Path(sys.argv[1]) / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, fields in {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": MAX_MODEL_LEN,
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "float32",
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": MAX_MODEL_LEN,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }.items():
        (folder / file).write_text(json.dumps(fields))
