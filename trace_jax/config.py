"""Every configuration key, once, with its meaning. The checks are in `validation.py`."""

import ml_collections
from ml_collections import config_dict

from trace_jax import methods
from trace_jax.errors import InputError

# What runs that were made before a key was there did: their stages stay done.
BEFORE = {
    "align.balance_steps": False,
    "correct.gemini_thinking_tokens": 0,
    "impact.reliability_examples": 0,
    "impact.strength": 1.0,
    "model.scratch.training.balance_steps": False,
    "train.balance_steps": False,
    "train.keep_best": False,
    "train.patience": 0,
    "train.perplexity_limit": 1.1,
}
_SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True)
_SWITCH |= dict.fromkeys(("0", "false", "no", "off"), False)


def base_config() -> ml_collections.ConfigDict:
    """The defaults.

    An experiment is a file with `get_config()` that changes some of them and says why.
    """
    c = ml_collections.ConfigDict()
    c.seed = 0  # gold batch, data order, sampling: everything random follows from it
    c.parent = (
        ""  # workdir of a finished run whose model, records and prompts this one goes on from
    )
    c.model = _model()
    c.mesh = _mesh()
    c.cpu_devices = 1  # that a CPU is taken for, rows side by side and a copy of the parameters on
    # each; 0: one a core, up to 4: about twice as fast for models of up to a few million parameters
    c.data = _data()
    c.policy = ml_collections.ConfigDict()
    c.policy.old = "synth_old"  # shipped name or YAML file: what M_ref was aligned to
    c.policy.new = "synth_new"  # what the model is re-aligned to
    c.judge = _judge()
    c.asking = _asking()
    c.triage = _triage()
    c.align = _training()  # DPO on the records as they are: makes M_ref
    c.align.enabled = True  # False: the model at model.path already is M_ref
    c.correct = _correct()
    c.impact = _impact()
    c.train = _training()
    c.train.method = "trace"  # a method or preset of trace_jax/methods.py
    c.train.punish = (
        "correction"  # correction: (y_c, y_w) where y_c was found, else dual NPO | dual_npo
    )
    c.train.layer_rows = 0  # rows of a data shard that a layer works on at once; 0: all. A few take
    # a third of the memory of many, and the parameters are gathered once for all
    c.train.alpha_kl = 0.1  # weight of the KL anchor of one RETAIN example
    c.train.retain_pairs = True  # trace: RETAIN records whose y_l violates are preference pairs as
    # well. False: as the paper
    c.train.alpha_nll = 0.5  # trace: NLL of a pair's better response, a token, beside a pair of
    # weight 1; keeps its probability from falling with the worse one's. 0: as the paper
    c.train.alpha_scale = "one"  # one | per_conflict: alpha_kl over the number of conflicts
    c.train.data_share = (
        1.0  # of the triaged records, scored and trained on: how much data is needed
    )
    c.train.data_seed = 0  # which of them
    c.train.refresh_every = 0  # steps after which impact weights are taken anew, at theta; 0: never
    c.train.evaluate_every = 0  # steps between evaluations on validation prompts; 0: none
    c.train.evaluate_prompts = 64
    c.train.keep_best = False  # end with the evaluation of highest guarded compliance (the last
    # step is evaluated as well) among those within perplexity_limit, not with the last step
    c.train.perplexity_limit = 1.1  # keep_best: over M_ref's, on the base model's own samples
    c.train.patience = 0  # keep_best: evaluations in a row over that, after which training ends; 0:
    # never
    c.train.stop_below = 0.0  # end early where the share of samples that keep the unchanged clauses
    # and are not degenerate falls below this part of M_ref's; 0: never
    c.train.skip_steps = 0  # steps whose loss or gradient is not finite that are left out, and
    # counted (train/skipped); one more ends the run
    c.u2a = _u2a()
    c.evaluate = _evaluate()
    c.plan = _plan()
    c.tracking = _tracking()
    return c.lock()


def _model() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.path = ""  # Hugging Face directory of the deployed model; empty: train model.scratch first
    c.ref_path = ""  # directory of M_ref, where the deployed model is another than model.path
    c.hf_config = ml_collections.ConfigDict()  # its config.json, so that --plan needs no download
    c.dtype = "float32"  # float32 | bfloat16: activations, and weights but for those that train
    c.stop_ids = ()  # token ids that end a response; empty: the model's own EOS
    c.remat = "layer"  # the backward pass finds stored: layer (inputs of layers; on CPU fastest as
    # well) | dots (also products of matrices) | none (everything; no recomputation)
    c.attention_block = -1  # queries that attend at once, to no keys but those that one of them
    # sees, and sampled tokens to used slots of the cache; 0: whole rows and caches; -1: on CPU 32
    # in rows of 256 tokens and more, else whole rows
    c.head_chunk = 0  # tokens of a data shard whose logits exist at once; 0: 4 MiB of logits
    c.scratch = s = ml_collections.ConfigDict()  # shape of a model trained from scratch
    s.family = "llama"  # llama | qwen2 | gemma2
    s.hidden_size = 96
    s.intermediate_size = 256
    s.layers = 4
    s.heads = 6
    s.kv_heads = 3
    s.context = 128  # tokens
    s.documents = 12_000  # synth: texts it is trained on; otherwise those of the records
    s.tokenizer = ""  # folder or tokenizer.json; empty: SynthValueBench's own
    s.training = _training()
    return c


def _mesh() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()  # devices along each axis; -1: those that are left
    c.data = 1  # copies of the parameters
    c.fsdp = -1  # parameters and optimizer state cut in parts
    c.fsdp_limit = 0  # the most that -1 stands for, the rest goes to data; 0: 64, and 1 on CPU
    c.tensor = 1  # matrices cut by heads and channels
    return c


def _data() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.source = "file"  # file | synth (SynthValueBench) | self_sampled (ordered by policy.old)
    c.path = ""  # file: JSONL, CSV, Parquet, folder, pattern or hub data set; see docs/data.md
    c.form = "auto"  # file: pairs | hh | pku | xstest; auto goes by the columns
    c.columns = ""  # file: ours=theirs, as in prompt=question,chosen=good,rejected=bad
    c.split = "train"  # file: of data sets with several
    c.limit = 0  # file: most records, drawn at random over the whole file; 0: all
    c.malformed = "error"  # file: a malformed row: error | drop (counted)
    c.prompts_path = ""  # file: held-out prompts; empty: taken out of the records' prompts
    c.hold_out = "all"  # prompts of prompts_path that no record may have: all | used (those drawn)
    c.max_length = 512  # tokens of a prompt and one response
    c.too_long = "error"  # a response that does not fit: error | drop (counted and named) | cut
    c.as_chat = False  # prompts that are plain text become a user's turn under the chat template
    c.append_stop = True  # put the first stop id behind every response
    c.row_length = 0  # tokens of a packed row; 0: what the steps fill best, up to twice the longest
    c.pairs = 2000  # synth, self_sampled: most pairs
    c.validation_prompts = 200  # held out for choosing an operating point
    c.test_prompts = 400  # held out for the figures that are reported
    c.openings = 1200  # self_sampled: train prompts
    c.opening_tokens = (12, 32)  # self_sampled: shortest and longest prompt, tokens
    c.continuations = 4  # self_sampled: responses sampled a prompt
    return c


def _judge() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()  # whatever changes a judge's answers
    c.name = "rules"  # rules | labels | gemini | local | ensemble; see trace_jax/judges
    c.gemini = g = ml_collections.ConfigDict()
    g.model = "gemini-2.5-flash"
    g.temperature = 0.0
    g.max_output_tokens = 2048  # of a reply, thinking included
    g.thinking_tokens = 0  # budget of the model's own thinking; -1: as the model likes
    g.clauses_per_call = 0  # clauses asked about in one call; 0: all
    c.local = m = ml_collections.ConfigDict()
    m.model = ""  # Hugging Face directory or hub id of any supported model
    m.dtype = "bfloat16"  # float32 | bfloat16
    m.max_length = 4096  # tokens of a question; the middle of a longer response is left out
    m.compliant_from = 0.5  # P(compliant) from which the answer is "compliant"
    m.violating_below = 0.5  # P(compliant) below which it is "violating"; between: abstain
    m.least_mass = 0.05  # abstain where "Yes" and "No" together are less likely than this
    c.ensemble = e = ml_collections.ConfigDict()
    e.members = ("rules", "labels")  # judges that vote, clause by clause
    e.least_votes = 1  # members that have to decide a clause; with fewer it abstains
    return c


def _asking() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()  # how judges are asked; changes no answer
    c.store = ""  # file of the judgement store; empty: judgements.sqlite in the workdir
    c.reask_abstentions = False  # ask again where a judge abstained; errors always are
    c.vertex_project = ""  # Google Cloud project; empty: Developer API, key in GEMINI_API_KEY
    c.vertex_location = "global"
    c.concurrency = 32  # calls in flight
    c.requests_per_minute = 0.0  # 0: no limit
    c.timeout_seconds = 60.0  # of one attempt
    c.tries = 6  # attempts at one question
    c.backoff_seconds = 1.0  # before the second attempt at most so long, then twice that, ..., 60
    c.outage_seconds = 120.0  # without any answer of the service: stop, go on by a rerun
    c.budget_usd = 0.0  # the most that all calls in the store may have cost; 0: no limit
    c.budget_calls = 0  # the most attempts in the store; 0: no limit
    c.price_input = 0.30  # US dollars for a million tokens of gemini-2.5-flash; give your model's
    c.price_cached = 0.03  # the same of input tokens that the service had in its cache
    c.price_output = 2.50  # thinking included
    c.batch = False  # gemini: Batch API, half the price, answers within a day
    c.batch_discount = 0.5  # share of the price that a batch costs
    c.batch_wait_minutes = 0.0  # wait so long for a batch; then leave, and pick it up by a rerun
    c.micro_rows = 4  # local: packed rows computed at once
    return c


def _triage() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.decide_by = "status"  # the judge's own | probability: by the two thresholds below
    c.compliant_from = 0.5  # P(compliant) from which a response counts as compliant
    c.violating_below = 0.5  # P(compliant) below which it counts as violating; between: UNRESOLVED
    c.soft = False  # a record trains every action, each by its probability
    c.overrides = ""  # JSONL of what people say of records, see trace_jax/overrides.py
    c.noise = 0.0  # share of records whose verdicts are corrupted on purpose: robustness studies
    c.error = (
        0.0  # mean share of single verdicts that are wrong on purpose, with probabilities that
    )
    # say how sure: robustness studies of soft triage; up to 0.25. Corrections are judged so as well
    c.noise_seed = 42
    c.coverage_least = 20  # warn of clauses that fewer conflicts touch
    return c


def _training() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.total_steps = 200
    c.examples_per_step = 32  # preference, NPO and NLL examples; the loss is their mean
    c.retain_per_step = 32  # KL examples beside them; their mean times alpha_kl is added
    c.micro_rows = 4  # packed rows that a data shard computes at once, of both kinds together; a
    # step scans over such micro-batches
    c.balance_steps = True  # deal examples so that steps have about as many tokens each; False: at
    # random, and every step is computed at the size of the largest
    c.learning_rate = 1e-4  # peak
    c.warmup_steps = 10
    c.final_fraction = 0.1  # of the peak, at the end of the cosine
    c.weight_decay = 0.0
    c.clip_norm = 1.0
    c.b1 = 0.9
    c.b2 = 0.999
    c.mu_dtype = "float32"  # of AdamW's first moment: float32 | bfloat16
    c.beta = 0.1  # of the logistic preference loss and of NPO
    c.preference = "logistic"  # logistic | squared
    c.tau = 0.1  # of the squared preference loss
    c.length_normalised = False  # divide logratios of the preference loss by response length
    c.npo_scale = "plain"  # plain | two_over_beta
    c.drift = 0.0  # weight of the mean squared distance from the weights that training begins with
    c.adapters = "none"  # none: full fine-tuning | lora
    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.lora.targets = "all"  # all, or names out of q,k,v,o,gate,up,down joined by commas
    c.save_every = 100  # steps between checkpoints
    c.keep = 2  # checkpoints kept
    return c


def _u2a() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()  # train.method=u2a: bi-level weighted unlearning
    c.inner = "npo"  # npo | ga (gradient ascent) | graddiff (ga with a KL anchor)
    c.top = 1024  # records unlearned: those whose unlearning lowers J most
    c.eta = 0.01  # step of the exponentiated weights, omega * exp(eta * score)
    c.rounds = 3  # times that scores are taken and weights updated
    c.drift = 0.1  # ga: weight of the mean squared distance from M_ref
    c.alpha_kl = 0.3  # graddiff: weight of the KL anchor of one RETAIN example
    return c


def _correct() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.source = "self"  # who writes: self | local | gemini | none; the judge keeps what complies
    c.writer = "base"  # self: which model writes: base | ref
    c.local_model = ""  # local: Hugging Face directory or hub id of any supported model
    c.local_dtype = "bfloat16"  # float32 | bfloat16
    c.instruct = True  # local: told the new policy; False: given the prompt alone
    c.gemini_model = "gemini-2.5-flash"  # asked as section `asking` says, out of the same budget
    c.gemini_thinking_tokens = 0  # of its own, beside max_new_tokens; -1: as the model likes
    c.tries = 64  # most samples a prompt; gemini: 4 are plenty
    c.samples_per_round = 8  # samples of every open prompt between two judgements
    c.pick = "first"  # of a round's compliant samples: first | best (highest P(compliant))
    c.max_new_tokens = 80
    c.temperature = 1.0
    c.guard = True  # keep only text that also passes the degeneracy guard
    return c


def _impact() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.weights = "impact"  # impact | uniform (w = 1) | shuffled (a control: the same weights, dealt
    # at random within each action)
    c.path = "jvp"  # jvp | jvp_losses | vmap_grad (the reference)
    c.gold_size = 300  # pairs in the gold batch
    c.gold_draw = "thirds"  # of the actions: thirds (as the paper) | proportional
    c.reliability_examples = 512  # conflicts scored along half of the gold batch as well; 0: all
    c.gold_beta = 0.1  # of J's logistic loss
    c.normalisation = "mean_one"  # mean_one | sum_to_one (as the paper)
    c.within = "all"  # weights are normalised over: all conflicts | action (each has mean 1)
    c.strength = 0.25  # share of a weight that its score decides, the rest is 1; 1: as the paper
    c.clamp = True  # negative scores count as 0; False: they stay (mean absolute weight 1)
    c.curvature = "identity"  # scores along (H + damping)^-1 g_J: identity (as the paper) |
    # fisher_diag | cg (conjugate gradients on Hessian-vector products)
    c.damping = 0.1  # of the mean diagonal (fisher_diag), of the curvature along g_J (cg)
    c.curvature_examples = 256  # conflicts that the curvature is estimated on
    c.cg_iterations = 20
    c.cg_tolerance = 0.01  # residual over |g_J| at which cg stops
    c.clamp_warning = 0.8  # warn when more than this share of an action's scores is clamped
    c.micro_rows = 4
    return c


def _evaluate() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.splits = ("test",)  # of test, validation
    c.samples = 2  # a prompt, at temperature
    c.temperature = 1.0
    c.max_new_tokens = 80
    c.batch_rows = 64  # sequences decoded at once
    c.micro_rows = 4  # packed rows of the likelihood pass
    return c


def _plan() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()  # what --plan reckons with
    c.utilisation = 0.4  # share of peak FLOPs that training and scoring reach
    c.decode_utilisation = 0.02  # the same of decoding, which waits for memory
    c.peak_tflops = 0.0  # of one device, bfloat16; 0: known for TPUs and common GPUs
    c.prompt_tokens = 60  # of a record, where the data is not here
    c.response_tokens = 150
    return c


def _tracking() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()  # beside metrics.jsonl
    c.tensorboard = True  # event files in WORKDIR/tensorboard
    c.wandb = ""  # project of Weights & Biases (WANDB_API_KEY, WANDB_MODE); empty: none
    c.stuck_after = 300.0  # seconds without progress until a warning says what waits; 0: never
    return c


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, object]:
    """{"train.beta": 0.1, ...}, tuples as lists, ready for JSON."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, config_dict.ConfigDict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def with_overrides(
    config: ml_collections.ConfigDict, overrides: dict[str, object]
) -> ml_collections.ConfigDict:
    """A copy of the config with keys set; text becomes the type of the key's value."""
    config = config.copy_and_resolve_references()
    for key, value in overrides.items():
        *sections, name = key.split(".")
        target = config
        try:
            for section in sections:
                target = target[section]
            kind = type(target[name])
        except (KeyError, AttributeError, TypeError) as error:
            raise InputError(f"unknown config key {key!r} (see trace_jax/config.py)") from error
        if issubclass(kind, config_dict.ConfigDict):
            inner = ", ".join(f"{key}.{of}" for of in list(target[name])[:3])
            raise InputError(f"{key} is a section of the config; set a key of it, as in {inner}")
        target[name] = (
            _converted(key, value, kind) if isinstance(value, str) and kind is not str else value
        )
    return config


def _converted(key: str, value: str, kind: type):
    if kind is bool:
        if value.lower() not in _SWITCH:
            raise InputError(f"{key}={value[:60]!r} is no switch; use one of {', '.join(_SWITCH)}")
        return _SWITCH[value.lower()]
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={value[:60]!r} is not a {kind.__name__}") from error


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy as the stages want it.

    A train.method that names a preset is its method with its settings; a parent decides what
    `generations.settings` says; --config.evaluate.splits may join names by commas.
    """
    from trace_jax import generations

    method = config.train.method
    if method not in (*methods.METHODS, *methods.PRESETS):
        raise InputError(
            f"train.method={method!r} is unknown; use one of {', '.join(methods.METHODS)}, or a "
            f"preset: {', '.join(methods.PRESETS)}"
        )
    config = with_overrides(config, methods.PRESETS.get(method, {}))
    config = with_overrides(config, generations.settings(config))
    joined = ",".join(config.evaluate.splits)
    config.evaluate.splits = tuple(name.strip() for name in joined.split(",") if name.strip())
    return config
