"""The constants of speculation, each with what it trades. They change speed, never a text.

They were chosen on the benchmarks of `worker.bench`. Times and acceptance rates are not among them: they are
measured.
"""

from __future__ import annotations

import numpy as np

# Means of times, in milliseconds.
TIME_WEIGHT = 0.1  # of a new sample. Higher follows a changed clock sooner; lower is less noisy.
TIME_OUTLIER = 1.5  # a sample counts as at most this factor away from its mean. Higher lets pauses of the machine in.
LAYER_OUTLIER = 2.0  # the same for the time of a draft layer, upwards only: a layer is short, and its time varies more

# Cost model of verification (cost_model.py).
SHAPE_WEIGHT = 0.03  # of a new step in the correction of its size. Higher mistakes drift of the machine for shape.
MAX_CORRECTION = 2.0  # factor by which one size may differ from its calibration. Higher trusts few samples more.
MIN_PLAIN_STEPS = 2  # plain steps of a load class before drafts are judged by them. More delays the first draft.

# Acceptance model (acceptance_model.py).
PROBABILITY_EDGES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])  # more bins learn more slowly
DEPTH_CLASSES = 4  # depths with statistics of their own, the last class for all deeper ones. More learn more slowly.
ACCEPTANCE_PRIOR = 4.0  # accepted of expected tokens per bin at the start. Higher believes the drafter for longer.
ACCEPTANCE_DECAY = 0.998  # per step: half is forgotten in 350 steps. Lower follows new texts sooner, and is noisier.
MAX_PROBABILITY = 0.995  # of a node. Higher lets a chain of near-certain tokens grow without end.
DISCOUNT_PRIOR = 30.0  # accepted of expected tokens at the start of `tree_discount`. Higher believes trees for longer.

# Draft costs (draft_costs.py).
MIN_CATCH_UP_TOKENS = 16  # uncached tokens per tree above which a layer's time is counted as catching up
BEST_CHILD_WEIGHT = 0.05  # of a new layer in `best_child_ratio`. Higher stops growth sooner after one bad layer.
BEST_CHILD_RECOVERY = 0.002  # per layer, of deeper ratios towards 1. Higher tries deeper layers again more often.

# Tree budget (tree_budget.py).
MIN_NET_GAIN = 0.03  # of a plain step's tokens. Lower verifies trees whose gain is within the error of the cost model.

# Growth (drafting.py).
MAX_FORCED_READS = 4  # forced tokens that a network reads to draft beyond them. More read longer keys, a layer each.

# Planner (planner.py).
CLOSE_GAIN = 0.1  # gain of drafts below which probes are more frequent: a wrong judgement is likely there
PROBE_CLOSE_FACTOR = 8  # how much more frequent. Higher judges better, and costs more plain steps.
CLEAR_GAIN = 0.25  # gain of drafts above which probes get rarer in proportion: each costs what drafts gain
MAX_TRIAL_SHARE = 0.25  # of the guard's tokens that catching up may cost before a draft has earned any
EARNING_HORIZON = 32  # steps over which a draft that has caught up is expected to earn. Higher catches up more readily.
MAX_LOOKUP_SHARE = 0.02  # of a step: a lookup below it that finds no candidates counts as a plain step

# Regret guard (regret_guard.py).
REFILL_RATE = 0.003  # tokens per token written: what each of at most two strategies may lose in the long run
BUCKET_TOKENS = 4.0  # initial level, and the least capacity. Higher gives new drafts a longer trial.
BUCKET_TOKENS_PER_SEQUENCE = 0.5  # capacity of larger batches. Higher lets old gains pay for longer losses.
TRIAL_BATCH = 4  # largest batch that may try drafts before they have gained. Higher finds out sooner, and loses more.
REOPEN_TOKENS = 0.5  # level at which a blocked strategy may draft again. Higher makes fewer and longer trials.
GAIN_WEIGHT = 0.05  # of a new step in gain, speed-up and throughput. Higher follows new texts sooner, and is noisier.
STEP_OUTLIER = 2.5  # a step counts as at most this many usual ones. Higher blames drafts for pauses of the machine.
