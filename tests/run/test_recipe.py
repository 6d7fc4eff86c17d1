"""A recipe says what is wrong with it in one line, and every recipe of the tree runs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.data import splits
from hsvit_ds.engine import engine as config
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Grid
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run import title
from hsvit_ds.run.trainer import Trainer

from .. import tars
from ..ranks import RECIPES, ROOT

DIGITS = ROOT / "recipes/digits/hsvit.toml"


@pytest.mark.heavy
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_every_recipe_resolves_builds_and_steps(path: Path, tmp_path: Path) -> None:
    recipe, plan = recipes.resolve(recipes.read(path), recipes.read(path).grid.submodule_ranks)
    facts = splits.facts(recipe.data)
    # Everything derived is filled in.
    assert (recipe.data.image_size, recipe.data.classes) == (facts.image_size, facts.classes)
    assert min(facts.image_size, facts.classes, recipe.run.micro_batch, recipe.run.bn_batch) > 0
    assert recipe.engine.precision != "auto"
    with torch.device("meta"):
        model = recipe.model.build(image_size=facts.image_size, channels=facts.channels, classes=facts.classes)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters
    overrides = ["grid.submodule_ranks=1", "run.global_batch=8", "tracking.mlflow=false", "data.workers=0"]
    overrides.append("engine.compile=false")  # two minutes
    if recipe.data.name != "digits":
        held_out = recipe.data.val if recipe.data.val == recipe.data.test else "val"
        sizes = {"classes": facts.classes, "side": facts.image_size, "channels": facts.channels}
        root = tars.data_set(tmp_path / "data", train=16, val=8, held_out=held_out, **sizes)
        overrides.append(f"data.root={root}")
    if recipe.model.kind == "vit":
        overrides.append("model.depth=1")
    if recipe.model.kind == "timm" or recipe.model.splits_images:  # at full size, two images take seconds
        overrides += ["run.global_batch=2", "augment.mix_block=2"]
        overrides.append("model.weights=" if recipe.model.kind == "timm" else "model.backbone.weights=")
    elif recipe.model.weights:
        overrides.append("model.weights=")
    if getattr(recipe.model, "distilled", False):  # a teacher's weights are not at hand
        overrides += ["model.distilled=false", "task.teacher.name="]
    small = recipes.read(path, overrides)
    small, plan = recipes.resolve(small, 1)
    run = Trainer(small, plan, Grid(small.grid, small.model.submodules), tmp_path, resume=False)
    result = run._step(next(run.reader.train(0, 0)), 0)
    assert result.applied
    assert result.losses.isfinite().all()


def test_a_data_set_without_a_folder_can_be_resolved_and_not_run(tmp_path: Path) -> None:
    recipe, plan = recipes.resolve(recipes.read(ROOT / "recipes/imagenette/scala_deit_ti.toml"), 1)
    assert plan.steps_per_epoch == 9469 // 128
    with pytest.raises(RefusedError, match=r"data.root is not set: the folder of imagenette's shards"):
        Trainer(recipe, plan, Grid(recipe.grid, 1), tmp_path, resume=False)


def test_the_resolved_recipe_resolves_to_itself(tmp_path: Path) -> None:
    recipe, plan = recipes.resolve(recipes.read(DIGITS, ["run.global_batch=64", "model.dropout=0"]), 2)
    (tmp_path / "recipe.toml").write_text(recipes.dumps(recipe))
    assert recipes.resolve(recipes.read(tmp_path / "recipe.toml"), 2) == (recipe, plan)


def test_a_recipe_of_widths_that_change_is_written_and_read_as_it_was(tmp_path: Path) -> None:
    keys = ["model.widths.then=[{epoch=3,granularity=0.25},{epoch=9,granularity=0.0625}]"]
    keys += ["model.widths.isolated=large", "task.pinned=[0.75]"]
    recipe, plan = recipes.resolve(recipes.read(SCALA, keys), 2)
    (tmp_path / "recipe.toml").write_text(recipes.dumps(recipe))
    assert recipes.resolve(recipes.read(tmp_path / "recipe.toml"), 2) == (recipe, plan)
    assert [len(family) for _, family in recipe.model.widths.families] == [7, 4, 13]
    assert title.changes(SCALA, keys, recipe) == (
        "then={epoch=3, granularity=0.25},{epoch=9, granularity=0.0625} isolated=large pinned=0.75"
    )


def test_hsvit_recipe_prints_what_it_resolves() -> None:
    result = CliRunner().invoke(app, ["recipe", str(DIGITS), "run.global_batch=64"])
    assert result.exit_code == 0
    printed = tomllib.loads(result.stdout)
    assert printed["run"]["global_batch"] == 64
    assert printed["model"]["kernels"] == [64, 128]
    assert "# accumulation = 1" in result.stdout


def test_accumulation_is_derived() -> None:
    overrides = ["run.global_batch=96", "run.micro_batch=8", "run.bn_batch=8"]
    _, plan = recipes.resolve(recipes.read(DIGITS, overrides), 8)
    assert (plan.replicas, plan.micro_batch, plan.accumulation, plan.bn_runs) == (4, 8, 3, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.drpout=0.1", 'unknown key "model.drpout"; did you mean "model.dropout"?'),
        ("modle.dropout=0.1", 'unknown key "modle"; did you mean "model"?'),
        ("run.lr=0.1", 'unknown key "run.lr"; did you mean "optimizer.lr"?'),
        ("run.epochs=ten", "run.epochs = 'ten': input should be a valid integer"),
        ("run.epochs=1.5", "run.epochs = 1.5: input should be a valid integer"),
        ("run.epochs=true", "run.epochs = True: input should be a valid integer"),
        ("run.epochs=0", "[run] epochs = 0: must be at least 1"),
        ("model.kernels=64", "model.kernels = 64: input should be a valid"),
        ("model.submodules=3", "[model] submodules = 3 does not divide groups = 16"),
        ("run.global_batch=33", "run.global_batch = 33 is not divisible by 2 replicas"),
        ("run.micro_batch=7", "run.micro_batch = 7 does not divide a replica's part of the global batch, 32 / 2"),
        ("run.micro_batch=4", "run.bn_batch = 0: BatchNorm over 32 images needs them in one forward"),
        ("run.global_batch=4096", "run.global_batch = 4096 is more than the 1,150 training images"),
        ("grid.submodule_ranks=4", "more submodule ranks than submodules"),
        ("grid.exchange=int4", '[grid] exchange = "int4": must be "fp32", "bf16" or "int8"'),
        (
            "grid.exchange=int8 grid.submodule_ranks=1 model.submodules=1",
            "model.submodules = 1 has nothing to exchange",
        ),
        ("augment.mixup=1.0 augment.mix_block=5", "augment.mix_block = 5 does not divide the micro batch of 16"),
        ("engine.deepspeed.gradient_clipping=5.0", "engine.deepspeed.gradient_clipping = 5.0 contradicts 1.0"),
        ("engine.deepspeed.gradient_compression=true", "engine.deepspeed.gradient_compression: unknown to DeepSpeed"),
        (
            "engine.deepspeed.zero_optimization.overlap_com=true",
            'engine.deepspeed.zero_optimization.overlap_com: unknown to DeepSpeed; did you mean "overlap_comm"?',
        ),
        ("engine.deepspeed.zero_optimization.stage=3", "engine.deepspeed.zero_optimization.stage = 3 contradicts 1"),
        ("tracking.uri=http://me:secret@host/", "[tracking] uri holds a user name or password"),
        ("model.kind=vitt", 'model.kind = "vitt": must be one of hsvit, vit, mobilenet, uniformer, timm'),
        ("task.sampling=paper", "task.kind is missing: one of supervised, scala"),
        ("task.kind=scala task.sampling=some", '[task] sampling = "some": must be one of paper'),
        ("task.kind=scala task.teacher.nam=x", 'unknown key "task.teacher.nam"; did you mean "task.teacher.name"?'),
        ("task.kind=scala task.teacher.alpha=2.0", "[task.teacher] alpha = 2.0: must be above 0 and at most 1"),
        ("task.kind=scala task.sampling=fixed task.width=0.5", "[task] width 0.5: must be 1, this model's only one"),
        ("task.kind=scala task.width=0.5", '[task] width = 0.5 is for sampling = "fixed"; this is "paper"'),
        ("model.widths.smallest=0.5", 'model.widths.smallest = 0.5 needs task.kind = "scala"'),
        (
            "model.widths.smallest=0.4 model.widths.granularity=0.2 task.kind=scala",
            "[model] width 0.40: 0.4 x 8 groups",
        ),
        ("model.widths.family=[0.5,1]", 'model.widths.family = [0.5, 1.0] needs task.kind = "scala"'),
        ("model.widths.smallest=0.4", "[model.widths] granularity = 0.125 does not divide 1 - smallest = 0.6"),
        ("run.epochs", 'override "run.epochs": must have the form key.path=value'),
    ],
)
def test_bad_input_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        recipes.resolve(recipes.read(DIGITS, override.split()), 4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


SCALA = ROOT / "recipes/digits/scala.toml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.distilled=true", "model.distilled = true needs a teacher: set task.teacher.name"),
        ("model.widths.smallest=true", 'model.widths.smallest = True: must be a number, or a fraction such as "1/12"'),
        ("model.widths.granularity=1/0", 'granularity = "1/0": a fraction\'s denominator must not be 0'),
        (
            "model.widths.family=[0.5,1]",
            "[model.widths] family = [0.5, 1.0] says every width of the run; leave smallest",
        ),
        ("model.widths={family=[0.5,true]}", "model.widths.family.1 = True: must be a number, or a fraction such as"),
        ("model.mlp_ratio=wide", "model.mlp_ratio = 'wide': must be a number, or a list of one for each block"),
        ("model.mlp_ratio=[2,'x']", "model.mlp_ratio = [2, 'x']: must be a number, or a list of one for each block"),
        (
            "model.mlp_ratio=[2,4]",
            "[model] mlp_ratio = [2.0, 4.0] has 2 numbers for depth = 4; give one a block, or one",
        ),
        ("model.widths={family=0.5}", "model.widths.family = 0.5: input should be a valid"),
        ("model.widths={family=['1/9',1]}", "[model] width 0.111111: 0.111111 x embedding 128 = 14.2222 is not"),
        ("model.widths.isolated=3", "model.widths.isolated = 3: must be true, false or a word"),
        ("model.distilled=true task={kind='supervised'}", 'model.distilled = true needs task.kind = "scala"'),
        (
            "task.sampling=fixed task.width=0.3",
            "[task] width 0.3 is not one of the 7 of this model; nearest: 0.25, 0.375",
        ),
        (
            "task.pinned=[0.25]",
            "[task] pinned = [0.25]: width 0.25 is in neither range between: they are 0.75 to 0.875",
        ),
        ("task.pinned=0.75", "task.pinned = 0.75: input should be a valid"),
        ("task.transfer_token=class", '[task] transfer_token = "class": model.distilled = false has one output'),
        ("model.widths.isolated=both", '[model.widths] isolated = "both": must be true, false, "large" or "small"'),
        (
            "model.widths.then=[{epoch=40,granularity=0.25}]",
            "model.widths.then: epoch = 40 is outside the run: must be below run.epochs = 40",
        ),
        (
            "model.widths.then=[{epoch=30,granularity=0.5}]",
            "[model.widths] then: after epoch 30 granularity = 0.5 does not divide 1 - smallest = 0.75, which would",
        ),
        ("model.widths.then=[{epoch=30,granularty=0.25}]", 'did you mean "model.widths.then.granularity"?'),
        (
            "model.widths.then=[{epoch=30,granularity=0.25,side='leading'}]",
            'unknown key "model.widths.then.side"; it is one of the whole table: "model.widths.side"',
        ),
        (
            "model.widths.then=[{epoch=30,smallest=0.5}]",
            'unknown key "model.widths.then.smallest"; it is one of the whole table: "model.widths.smallest"',
        ),
        ("model.widths.then=[{epoch=30}]", "model.widths.then.0.granularity is missing"),
        ("model.heads=48", "[model] heads = 48 does not divide embedding = 128"),
        ("model.heads=32", "[model] width 0.375: 0.375 x embedding 128 = 48 is not a multiple of heads = 32; nearest:"),
        ("model.widths.slice=layers", '[model.widths] slice = "layers": must be "channels" or "heads"'),
        (
            "model.widths.slice=heads",
            "[model] width 0.375: 0.375 x heads 4 = 1.5 is not a whole number; nearest: 0.25, 0.50",
        ),
        ("model.widths.slice=heads model.qkv=fused", '[model] qkv = "fused" slices q, k and v as one block'),
        ("model.variant=DeiT-X", '[model] variant = "DeiT-X": must be one of DeiT-Ti, DeiT-S, DeiT-B'),
        ("model.groups=4", 'unknown key "model.groups"; known: depth, distilled'),
        ("grid.submodule_ranks=2", "more submodule ranks than submodules"),
        ("task.teacher.name=runs/none", "runs/none: no checkpoint latest of a run there"),
    ],
)
def test_bad_input_of_scala_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        recipes.resolve(recipes.read(SCALA, override.split()), 2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


HYBRID = ROOT / "recipes/digits/hybrid.toml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone.nam=x", 'unknown key "model.backbone.nam"; did you mean "model.backbone.name"?'),
        ("model.backbone.name=test_resnt", 'model.backbone.name = "test_resnt": timm '),
        (
            "model.backbone.name=test_vit model.backbone.output_stride=32",
            'model.backbone.name = "test_vit" has no feature map',
        ),
        ("model.backbone.weights=a1", 'model.backbone.weights = "a1": neither a file ('),
        ("model.backbone.trained_stages=9", "trained_stages = 9: test_resnet has 5 stages"),
        ("model.backbone.output_stride=4", "[model.backbone] output_stride = 4: must be 8, 16 or 32"),
        ("model.depth=-1", "[model] a backbone gives no depth: set depth, the attention layers (2 in the paper)"),
        ("model.variant=C2A2", "[model] variant is of HSViT's own trunk; a backbone takes its place"),
        ("model.groups=20", "[model] groups = 20 does not divide the 96 kernels of the last block"),
        ("model.submodules=3", "[model] submodules = 3 does not divide groups = 4"),
        (
            "model.widths.smallest=0.5 model.widths.granularity=0.5 task.kind=scala",
            "[model] widths.smallest = 0.5: a backbone is not sliced",
        ),
        ("run.global_batch=18 run.micro_batch=9", "grid.submodule_ranks = 2 does not divide the micro batch of 9"),
        ("model.kind=timm", 'unknown key "model.'),
        ("model={kind='timm',name='test_resnet'}", "more submodule ranks than submodules"),
        ("model={kind='timm',name='test_resnt'} grid.submodule_ranks=1", 'model.name = "test_resnt": timm '),
        ("model={kind='timm',name='test_resnet',drop_path=2.0}", "[model] drop_path = 2.0: must be in [0, 1)"),
        ("model={kind='timm'}", "model.name is missing"),
    ],
)
def test_bad_input_of_timms_models_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        recipes.resolve(recipes.read(HYBRID, override.split()), 2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("granularity", "count"), [(0.25, 4), (0.125, 7), (0.0625, 13), (0.03125, 25)])
def test_one_key_sets_how_many_networks_are_trained(granularity: float, count: int) -> None:
    recipe, _ = recipes.resolve(recipes.read(SCALA, [f"model.widths.granularity={granularity}"]), 1)
    assert len(recipe.model.widths.all) == count


def test_named_widths_are_read_as_numbers_and_fractions_and_written_again() -> None:
    recipe = recipes.read(SCALA, ["model.widths={family=['1/8', 0.25, '1/2', 1]}"])
    assert [str(width) for width in recipe.model.widths.all] == ["0.125", "0.25", "0.50", "1.00"]
    assert recipes.from_table(recipes.to_table(recipe), "").model == recipe.model
    assert recipes.from_table(tomllib.loads(recipes.dumps(recipe)), "").model == recipe.model


def test_accumulation_without_batchnorm_needs_no_bn_batch() -> None:
    assert recipes.resolve(recipes.read(SCALA, ["run.micro_batch=4"]), 1)[1].accumulation == 8


def test_a_missing_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"none\.toml: cannot be read \(No such file"):
        recipes.read(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("model = [")
    with pytest.raises(RefusedError, match=r"broken\.toml: not valid TOML"):
        recipes.read(tmp_path / "broken.toml")


def test_expert_keys_reach_deepspeed() -> None:
    from hsvit_ds.engine.engine import deepspeed_config

    recipe = recipes.read(DIGITS, ["engine.deepspeed.zero_optimization.reduce_bucket_size=1000"])
    config = deepspeed_config(recipe.engine, 1.0, bf16=False, micro_batch=8, trained=100)
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}


def test_the_expert_keys_of_deepspeeds_own_documents_are_known() -> None:
    """As its pages on configuration name them; those that contradict a recipe aside."""
    config.deepspeed_config(
        config.Config(
            deepspeed={
                "wall_clock_breakdown": True,
                "memory_breakdown": False,
                "dump_state": False,
                "communication_data_type": "fp32",
                "prescale_gradients": False,
                "gradient_predivide_factor": 1.0,
                "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
                "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 1},
                "tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"},
                "csv_monitor": {"enabled": True, "output_path": "x", "job_name": "y"},
                "zero_optimization": {
                    "overlap_comm": True,
                    "contiguous_gradients": True,
                    "allgather_bucket_size": 1,
                    "reduce_scatter": True,
                    "stage3_max_live_parameters": 1,
                    "stage3_param_persistence_threshold": 1,
                    "offload_optimizer": {"device": "cpu", "pin_memory": True},
                },
            }
        ),
        1.0,
        bf16=False,
        micro_batch=1,
        trained=1,
    )
