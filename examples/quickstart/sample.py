"""Continue a prompt with the exported model, using nothing but transformers.

    python examples/quickstart/sample.py HF_DIR [--prompt TEXT] [--tokens N] [--seed N] [--output FILE]

That it loads and writes recognisable code is the check of the export; the text itself is what a few minutes of training buy.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in HF_DIR; ask no server

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, logging, set_seed  # noqa: E402

PROMPT = "import os\n\n\ndef read_lines(path):\n    "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", help="folder written by launch/convert.py to-hf")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=120, help="new tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the text here")
    args = parser.parse_args()

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.hf_dir)
    model = AutoModelForCausalLM.from_pretrained(args.hf_dir, dtype=torch.float32).eval()
    input_ids = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False).input_ids  # [1, prompt tokens]
    set_seed(args.seed)
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=args.tokens, do_sample=True,
                            temperature=0.7, top_k=40, pad_token_id=tokenizer.eos_token_id)  # [1, prompt + new tokens]
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
