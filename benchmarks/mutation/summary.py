"""A table of mutmut's results per module, and the names of the survivors: python summary.py FOLDER."""

import json
import sys
from collections import Counter
from pathlib import Path

SURVIVED, TIMEOUTS = {0, 33}, {-24, 24, 36, 152, 255}  # exit statuses of a mutant's tests; 33: no test reaches it


def outcome(code):
    return "survived" if code in SURVIVED else "timeout" if code in TIMEOUTS else "killed"


def row(name, mutants, counts):
    run = counts.total()
    score = f"{100 * (run - counts['survived']) / run:.1f} %" if run else "-"
    return f"| {name} | {mutants} | {run} | {counts['killed']} | {counts['timeout']} | {counts['survived']} | {score} |"


def main(folder):
    total, everything, survivors = 0, Counter(), []
    print("| module | mutants | run | killed | timeouts | survivors | score |\n|---|---|---|---|---|---|---|")
    for path in sorted(Path(folder, "mutants").glob("imaml*/**/*.py.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        if not codes:
            continue
        outcomes = {mutant: outcome(code) for mutant, code in codes.items() if code is not None}
        counts = Counter(outcomes.values())
        print(row(f"`{path.relative_to(Path(folder, 'mutants')).with_suffix('')}`", len(codes), counts))
        total, everything = total + len(codes), everything + counts
        survivors += [mutant for mutant, how in outcomes.items() if how == "survived"]
    print(row("all", total, everything), "", *survivors, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
