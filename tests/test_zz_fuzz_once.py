import sys, pytest, time
from pathlib import Path
import tests.test_fuzz_lines as f
def test_it(tmp_path, monkeypatch, capsys):
    import os
    t=time.time()
    n=int(os.environ["N"]); seed=int(os.environ["S"])
    r=f.tried(seed,n,tmp_path,monkeypatch,capsys)
    with capsys.disabled():
        print(f"\n{n} lines {time.time()-t:.0f} s; {len(r)} failures"); print("\n".join(r))
