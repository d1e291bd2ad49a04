"""vLLM's own word on flags and configurations: a JSON line in, a JSON line out.

A script of its own that the *server's* Python runs by path; it imports vLLM and nothing of varcas. Works with vLLM
0.24 to 0.32, whose argument parser moved in between. `validation.py`... is the owner's side: `engine/node.py`.

    {"command": "version"}                   -> {"ok": true, "version": "0.32.0"}
    {"command": "flags"}                     -> {"ok": true, "flags": [{"name": "max_num_seqs", ...}, ...]}
    {"command": "check", "argv": [...],      -> {"ok": true, "resolved": {"scheduler": {...}, ...}, "endpoint": "chat"}
     "endpoint": "auto"}                     or {"ok": false, "stage": "config", "error": "...", "flag": "max_num_seqs"}
"""
