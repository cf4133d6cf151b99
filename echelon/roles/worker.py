"""placeholder until rollout.worker exists"""
raise RuntimeError("no worker yet")
