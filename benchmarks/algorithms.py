"""The GRPO family as settings of a run of chain-sum: as in the papers, except where a comment says why not.

docs/guide/losses.md lists the same, and names the sources. Chain-sum's learning rate, 1e-4, is about 100 times that of
the papers; its longest right answer has 113 tokens of 128.
"""

ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grpo": (
        "learner.advantage.estimator=grpo",
        "learner.loss.proximal=sampled",
        "learner.loss.clip_low=0.2",
        "learner.loss.clip_high=0.2",
        "learner.loss.aggregation=sequence",
        "learner.loss.kl_coef=0.04",
    ),
    "dr_grpo": (
        "learner.advantage.estimator=dr_grpo",
        "learner.loss.proximal=sampled",
        "learner.loss.clip_low=0.2",
        "learner.loss.clip_high=0.2",
        "learner.loss.aggregation=fixed",
        "learner.loss.fixed_tokens=128",
    ),
    "dapo": (
        "learner.advantage.estimator=grpo",
        # The last 16 tokens of 128: 20 % of the room, as in the paper, would punish the longest right answers.
        "learner.advantage.overlong_tokens=128",
        "learner.advantage.overlong_cache_tokens=16",
        "learner.loss.proximal=sampled",
        "learner.loss.clip_low=0.2",
        "learner.loss.clip_high=0.28",
        "learner.loss.aggregation=token",
        "scheduling.drop_zero_variance=true",
    ),
    "gspo": (
        "learner.advantage.estimator=grpo",
        "learner.loss.kind=gspo",
        "learner.loss.proximal=sampled",
        # The paper's 3e-4 and 4e-4, times 100: so much more does a step at 100 times its learning rate move a ratio.
        "learner.loss.clip_low=0.03",
        "learner.loss.clip_high=0.04",
        "learner.loss.aggregation=sequence",
    ),
    "cispo": (
        "learner.advantage.estimator=grpo",
        "learner.loss.kind=cispo",
        "learner.loss.proximal=sampled",
        "learner.loss.clip_low=1",
        "learner.loss.clip_high=4",
        "learner.loss.aggregation=token",
    ),
    "decoupled_ppo": (
        "learner.advantage.estimator=grpo",
        "learner.loss.proximal=recomputed",
        "learner.loss.clip_low=0.2",
        "learner.loss.clip_high=0.2",
        "learner.loss.correction=token_tis",
        "learner.loss.aggregation=token",
        "learner.minibatches=4",
        # Four updates of a quarter batch each: Adam's square-root rule (arXiv:2205.10287) halves the rate.
        "learner.lr=5e-5",
    ),
}
