"""The trained CLIP vocabulary does not change from run to run."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_trained_vocabulary_is_that_of_any_process() -> None:
    """Rare words make for ties, which hash tables break differently in every process."""
    code = (
        "import hashlib, json, random\n"
        "from hf_vlp.models.clip.tokenization_clip import train_clip_tokenizer\n"
        "draws = random.Random(0)\n"
        "words = [''.join(draws.choices('abcdefghijklmnopqrstuvwxyz', k=draws.randint(2, 9))) for _ in range(400)]\n"
        "texts = [' '.join(draws.sample(words, 8)) for _ in range(300)]\n"
        "vocabulary = json.dumps(train_clip_tokenizer(texts, vocab_size=2000).get_vocab(), sort_keys=True)\n"
        "print(hashlib.sha256(vocabulary.encode()).hexdigest())\n"
    )
    command = [sys.executable, "-c", code]
    runs = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(runs) == 1
