"""Seconds that `import hf_vlp` adds to `import transformers`, each in fresh processes, alternating.

    python benchmarks/import_cost.py [repeats]

Prints the medians and their difference. Bound: 0.3 s.
"""

import statistics
import subprocess
import sys

LINES = {"transformers": "import transformers", "both": "import transformers, hf_vlp"}
_TIMED = "import time; start = time.perf_counter(); {line}; print(time.perf_counter() - start)"


def seconds(line: str) -> float:
    """Time of one statement in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", _TIMED.format(line=line)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(repeats: int = 7) -> float:
    taken: dict[str, list[float]] = {name: [] for name in LINES}
    for _ in range(repeats):
        for name, line in LINES.items():
            taken[name].append(seconds(line))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, value in medians.items():
        print(f"{LINES[name]:<32} {value:.3f} s  (of {min(taken[name]):.3f} to {max(taken[name]):.3f})")
    difference = medians["both"] - medians["transformers"]
    print(f"import hf_vlp adds {difference:.3f} s")
    return difference


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
