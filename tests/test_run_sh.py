"""run.sh: the commands that it would start, and how it ends when something is wrong. No task really runs."""
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = ["python3", "-m", "torch.distributed.run"]


@pytest.fixture
def repository(tmp_path):
    """A folder with nothing but run.sh in it."""
    shutil.copy(Path(__file__).resolve().parent.parent / "run.sh", tmp_path)
    return tmp_path


def call(repository, *words, cwd=None, path=None, **variables):
    """Run run.sh in an environment that holds `variables` only; `path` goes in front of PATH."""
    search = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(["bash", str(repository / "run.sh"), *map(str, words)], cwd=cwd or repository, text=True,
                          capture_output=True, timeout=60, env={"PATH": search, "HOME": str(repository), **variables})


def commands(repository, *words, **variables):
    """The commands that DRY_RUN prints, as lists of words."""
    result = call(repository, *words, DRY_RUN="1", **variables)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def flag(command, name):
    return command[command.index(name) + 1]


def error(result):
    """The one line that a refused call ends with."""
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not result.stdout
    return result.stderr


# ---------------------------------------------------------------- commands

def test_pretraining(repository):
    [command] = commands(repository, "imagenet_pretrain", "job", "vit_small", "teacher", 4, "--epochs", 3)
    assert command == [*LAUNCH, "--standalone", "--nproc_per_node", "4", "main_ibot.py",
                       "--data_path", "data/imagenet/train", "--arch", "vit_small", "--output_dir", "work_dirs/job",
                       "--epochs", "3", "--load_from", "auto"]


def test_one_process_needs_no_launcher(repository):
    """And so its exit code, 75 after a signal, is seen."""
    pretrain, evaluate = commands(repository, "imagenet_pretrain+imagenet_knn", "job", "vit_small", "teacher", 1)
    assert pretrain[:2] == ["python3", "main_ibot.py"] and evaluate[:2] == ["python3", "evaluation/eval_knn.py"]
    # In a step of several tasks it must not take the others for its own processes.
    for variables in ({"SLURM_PROCID": "1"}, {"RANK": "1"}):
        [command] = commands(repository, "imagenet_knn", "job", "vit_small", "teacher", 1, **variables)
        assert command[:6] == ["env", "RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "python3", "evaluation/eval_knn.py"]
    [command] = commands(repository, "imagenet_pretrain", "job", "vit_small", "teacher", 2, TOTAL_NODES="2", GPUS_PER_NODE="1")
    assert command[:5] == [*LAUNCH, "--nnodes", "2"] and flag(command, "--nproc_per_node") == "1"


@pytest.mark.parametrize("flags, resumes", [
    ([], True), (["--epochs", "3"], True), (["--load_from", "checkpoint0040.pth"], False), (["--load_from=auto"], False),
    (["--overwrite", "true"], False), (["--overwrite=on"], False)])
def test_pretraining_goes_on_unless_told_otherwise(repository, flags, resumes):
    pretrain, evaluate = commands(repository, "imagenet_pretrain+imagenet_knn", "job", "vit_small", "teacher", 1, *flags)
    assert (pretrain[-2:] == ["--load_from", "auto"]) == resumes
    assert not any(word.startswith("--load_from") for word in evaluate)


def test_joined_with_two_keys(repository):
    pretrain, teacher, student = commands(repository, "imagenet_pretrain+imagenet_knn", "job", "swin_tiny",
                                          "teacher,student", 16, "--epochs", 3, DATA_PATH="/my data")
    assert "main_ibot.py" in pretrain and flag(pretrain, "--epochs") == "3"
    assert flag(pretrain, "--data_path") == "/my data/train"
    assert flag(pretrain, "--nproc_per_node") == "8"
    for key, command in (("teacher", teacher), ("student", student)):
        assert command == [*LAUNCH, "--standalone", "--nproc_per_node", "8", "evaluation/eval_knn.py",
                           "--pretrained_weights", "work_dirs/job/checkpoint.pth", "--checkpoint_key", key,
                           "--data_path", "/my data", "--arch", "swin_tiny", "--output_dir", "work_dirs/job",
                           "--avgpool_patchtokens", "0"]


def test_pretraining_comes_first_whatever_the_order(repository):
    first, second = commands(repository, "imagenet_knn+imagenet_pretrain", "job", "vit_small", "teacher", 1)
    assert "main_ibot.py" in first and "evaluation/eval_knn.py" in second


def test_evaluation_alone_takes_flags_and_variables(repository):
    [command] = commands(repository, "imagenet_knn", "job", "vit_base", "student", 1, "--nb_knn", 5, "it's",
                         "--data_path=d", PRETRAINED="a b.pth", OUTPUT_DIR="out", AVGPOOL="2")
    assert command[-3:] == ["5", "it's", "--data_path=d"]
    assert "--data_path" not in command  # the user's own replaces the default
    assert flag(command, "--pretrained_weights") == "a b.pth"
    assert flag(command, "--output_dir") == "out"
    assert flag(command, "--avgpool_patchtokens") == "2"


SCRIPTS = {"imagenet_knn": "eval_knn.py", "imagenet_reg": "eval_logistic_regression.py", "imagenet_linear": "eval_linear_multi.py",
           "imagenet_linear_solo": "eval_linear.py", "imagenet_unsup_cls": "unsupervised/unsup_cls.py"}


@pytest.mark.parametrize("arch, blocks, pooling", [
    ("vit_small", "4", "0"), ("deit_small", "4", "0"), ("swin_tiny", "4", "0"), ("swin_base", "4", "0"),
    ("vit_tiny", "1", "2"), ("vit_base", "1", "2"), ("vit_large", "1", "2")])
def test_evaluations_after_pretraining(repository, arch, blocks, pooling):
    pretrain, *evaluations = commands(repository, "+".join(["imagenet_pretrain", *SCRIPTS]), "job", arch, "teacher", 1,
                                      "--epochs", "3", "--overwrite", "true")
    assert pretrain[-4:] == ["--epochs", "3", "--overwrite", "true"]
    kinds = [kind for kind in SCRIPTS if kind != "imagenet_linear_solo"]  # of the two probes the sweep, once
    assert [command[1] for command in evaluations] == [f"evaluation/{SCRIPTS[kind]}" for kind in kinds]
    for kind, command in zip(kinds, evaluations, strict=True):
        words = ["--pretrained_weights", "work_dirs/job/checkpoint.pth", "--checkpoint_key", "teacher", "--data_path",
                 "data/imagenet", "--arch", arch]
        keeps = ["--dump_features", "work_dirs/job/features", "--load_features", "work_dirs/job/features"]
        if "linear" in kind:  # a folder per key, but one results.json; weights that have changed are no reason to stop
            words += ["--output_dir", f"work_dirs/job/{kind.removeprefix('imagenet_')}/teacher", "--results_dir", "work_dirs/job",
                      "--n_last_blocks", blocks, "--avgpool_patchtokens", pooling, *keeps, "--load_from", "auto", "--overwrite", "true"]
        else:
            words += ["--output_dir", "work_dirs/job", *(["--avgpool_patchtokens", "0"] if "unsup" not in kind else []), *keeps]
        assert command[2:] == words


def test_one_rate_after_pretraining_is_the_sweep(repository):
    """As in the reference, where that TYPE also holds the other's name: there is no rate to run it at."""
    one, sweep = (commands(repository, f"{kind}+imagenet_pretrain", "job", "vit_small", "teacher", 1, "--lr", "0.001")
                  for kind in ("imagenet_linear_solo", "imagenet_linear"))
    assert one == sweep and one[1][1] == "evaluation/eval_linear_multi.py" and "--lr" not in one[1]
    [alone] = commands(repository, "imagenet_linear_solo", "job", "vit_small", "teacher", 1, "--lr", "0.003")
    assert alone[1] == "evaluation/eval_linear.py" and flag(alone, "--lr") == "0.003"


def test_part_wise_probing(repository):
    """A folder per key; its features are no other task's."""
    part, knn = commands(repository, "imagenet_part_linear+imagenet_knn", "job", "vit_small", "teacher", 8, "--batch_size_per_gpu", 64)
    assert part == [*LAUNCH, "--standalone", "--nproc_per_node", "8", "analysis/linear_part/eval.py", "--pretrained_weights",
                    "work_dirs/job/checkpoint.pth", "--checkpoint_key", "teacher", "--data_path", "data/imagenet", "--arch", "vit_small",
                    "--output_dir", "work_dirs/job/linear_part/teacher", "--results_dir", "work_dirs/job",
                    "--topk", "1", "7", "14", "56", "112", "196", "--batch_size_per_gpu", "64", "--load_from", "auto"]
    assert flag(knn, "--batch_size_per_gpu") == "64"


def test_variables_of_the_features(repository):
    """Each by itself, unlike in the reference."""
    def flags(kind, arch="vit_small", **variables):
        [command] = commands(repository, kind, "job", arch, "teacher", 1, **variables)
        return {name: flag(command, name) for name in ("--n_last_blocks", "--avgpool_patchtokens") if name in command}

    for kind in ("imagenet_linear", "imagenet_linear_solo"):
        assert flags(kind, LINEAR_N_LAST_BLOCKS="2") == {"--n_last_blocks": "2", "--avgpool_patchtokens": "0"}
        assert flags(kind, "vit_base", LINEAR_AVGPOOL="1", AVGPOOL="0") == {"--n_last_blocks": "1", "--avgpool_patchtokens": "1"}
    assert flags("imagenet_reg", AVGPOOL="2", LINEAR_AVGPOOL="1") == {"--avgpool_patchtokens": "2"}
    assert flags("imagenet_unsup_cls", AVGPOOL="2") == {}
    for name, value in (("AVGPOOL", "x"), ("LINEAR_AVGPOOL", "-1"), ("LINEAR_N_LAST_BLOCKS", "0")):
        assert f"{name} must be" in error(call(repository, "imagenet_knn", "job", "vit_small", "teacher", 1, **{name: value}))


def test_evaluations_alone_take_the_flags(repository):
    kinds = "imagenet_linear+imagenet_knn"
    linear, knn = commands(repository, kinds, "job", "vit_small", "teacher", 1, "--image_size", 96)
    assert linear[-4:] == ["--image_size", "96", "--load_from", "auto"] and knn[-2:] == ["--image_size", "96"]
    assert "--overwrite" not in linear  # of other weights, it may be another checkpoint's
    assert flag(linear, "--dump_features") == flag(knn, "--load_features") == "work_dirs/job/features"
    # What the user says counts, and for one evaluation nothing is kept.
    for word in ("--dump_features", "--load_features=x"):
        for command in commands(repository, kinds, "job", "vit_small", "teacher", 1, word, "mine"):
            assert not any("job/features" in other for other in command)
    assert "--dump_features" not in commands(repository, "imagenet_knn", "job", "vit_small", "a,b", 1)[0]
    assert "--dump_features" not in commands(repository, "imagenet_pretrain+imagenet_knn", "job", "vit_small", "a,b", 1)[1]
    for word in ("--load_from", "--overwrite=true"):
        [command] = commands(repository, "imagenet_linear_solo", "job", "vit_small", "teacher", 1, word, "x")
        assert command[-2:] == [word, "x"] and "auto" not in command


def test_several_keys_on_several_nodes(repository):
    for node, keys in (("0", ["a", "c"]), ("1", ["b"])):
        found = commands(repository, "imagenet_linear+imagenet_unsup_cls", "job", "vit_small", "a,b,c", 2, TOTAL_NODES="2", NODE_ID=node)
        assert [flag(command, "--checkpoint_key") for command in found] == keys * 2
        assert [flag(command, "--output_dir") for command in found[:len(keys)]] == [f"work_dirs/job/linear/{key}" for key in keys]
        assert all("--standalone" in command for command in found)


def test_other_data_sets_have_other_folders(repository):
    (repository / "work_dirs/job").mkdir(parents=True)
    (repository / "work_dirs/job/checkpoint.pth").touch()
    path = fake_python(repository / "bin", 0)
    words = ("imagenet_knn", "job", "vit_small", "teacher", 1, "--dataset", "cifar10")
    assert call(repository, *words, path=path).returncode == 0  # though there is no data/imagenet
    [command] = commands(repository, *words)
    assert "--data_path" not in command
    [command] = commands(repository, *words, DATA_PATH="mine")
    assert flag(command, "--data_path") == "mine"
    [command] = commands(repository, *words, "--dataset=imagefolder")
    assert flag(command, "--data_path") == "data/imagenet"


def test_retrieval_and_copy_detection(repository):
    """Data of their own, one results.json; flags come after the task's own."""
    kinds = "paris_oxford_reid+copydays_copydet+copydays_copydey"
    retrieval, copies, misspelt = commands(repository, kinds, "job", "vit_small", "student", 1, "--imsize", 224, AVGPOOL="2", DATA_PATH="x")
    start = ["--pretrained_weights", "work_dirs/job/checkpoint.pth", "--checkpoint_key", "student", "--data_path"]
    assert retrieval == ["python3", "evaluation/eval_image_retrieval.py", *start, "data/revisited_paris_oxford", "--arch", "vit_small",
                         "--output_dir", "work_dirs/job", "--dataset", "rparis6k", "roxford5k", "--imsize", "512", "--multiscale",
                         "true", "--avgpool_patchtokens", "2", "--imsize", "224"]
    assert copies == misspelt == ["python3", "evaluation/eval_copy_detection.py", *start, "data/copydays", "--arch", "vit_small",
                                  "--output_dir", "work_dirs/job", "--imsize", "224"]
    (repository / "data/revisited_paris_oxford/rparis6k").mkdir(parents=True)
    assert "no folder data/revisited_paris_oxford/roxford5k" in error(call(repository, kinds, "job", "vit_small", "student", 1))


FINETUNING = ["--lr", "1e-3"]


@pytest.mark.parametrize("arch, flags", [
    ("vit_small", ["--epochs", "200", "--warmup_epochs", "20", "--layer_decay", "0.75", "--drop_path", "0.1"]),
    ("vit_base", ["--epochs", "100", "--warmup_epochs", "20", "--layer_decay", "0.65", "--drop_path", "0.2"]),
    ("vit_large", ["--epochs", "50", "--warmup_epochs", "5", "--layer_decay", "0.75", "--drop_path", "0.4", "--batch_size_per_gpu", "64",
                   "--accum_iter", "2"]),
    ("swin_base", ["--epochs", "100", "--warmup_epochs", "20", "--layer_decay", "0.65"]),
    ("swin_large", ["--epochs", "100", "--warmup_epochs", "20", "--layer_decay", "0.65"])])
def test_fine_tuning_on_imagenet(repository, arch, flags):
    [command] = commands(repository, "imagenet_cls", "job", arch, "teacher", 8, "--lr", "8e-4,2e-3")
    assert command == [*LAUNCH, "--standalone", "--nproc_per_node", "8",
                       "evaluation/classification_layer_decay/run_class_finetuning.py", "--pretrained_weights",
                       "work_dirs/job/checkpoint.pth", "--checkpoint_key", "teacher", "--data_path", "data/imagenet", "--arch", arch,
                       "--output_dir", "work_dirs/job/cls/imnet/teacher", "--results_dir", "work_dirs/job", *flags, *FINETUNING,
                       "--lr", "8e-4,2e-3", "--load_from", "auto"]
    # All nodes take part, for one key after the other.
    for node in "01":
        found = commands(repository, "imagenet_cls", "job", arch, "teacher,student", 8, TOTAL_NODES="2", NODE_ID=node)
        assert [flag(command, "--checkpoint_key") for command in found] == ["teacher", "student"]
        assert all(flag(command, "--nnodes") == "2" and flag(command, "--node_rank") == node for command in found)


@pytest.mark.parametrize("kind, arch, dataset, path, folder, lr, epochs, more", [
    ("cifar_cls", "vit_small", "cifar100", "cifar", "cifar", "7.5e-6", "1000", []),
    ("cifar10_cls", "vit_base", "cifar10", "cifar", "cifar10", "7.5e-6", "1000", []),
    ("cars_cls", "vit_small", "cars", "cars", "cars", "7.5e-5", "1000", []),
    ("flwrs_cls", "vit_base", "flowers", "flwrs", "flwrs", "7.5e-6", "1000", []),
    ("inat_cls", "vit_small", "inat2018", "inat/2018", "inat", "5e-5", "360", ["--reprob", "0.1"]),
    ("inat_cls", "vit_base", "inat2018", "inat/2018", "inat", "7.5e-6", "360", ["--reprob", "0.1"]),
    ("inat19_cls", "deit_small", "inat2019", "inat/2019", "inat19", "2.5e-5", "360", ["--reprob", "0.1"]),
    ("inat19_cls", "vit_base", "inat2019", "inat/2019", "inat19", "7.5e-6", "360", ["--reprob", "0.1"])])
def test_transfer(repository, kind, arch, dataset, path, folder, lr, epochs, more):
    [command] = commands(repository, kind, "job", arch, "student", 1, DATA_PATH="imagenet's")
    assert command == ["python3", "evaluation/eval_cls.py", "--pretrained_weights", "work_dirs/job/checkpoint.pth", "--checkpoint_key",
                       "student", "--data_path", f"data/{path}", "--arch", arch, "--output_dir", f"work_dirs/job/cls/{folder}/student",
                       "--results_dir", "work_dirs/job", "--dataset", dataset, "--lr", lr, "--epochs", epochs, *more,
                       "--load_from", "auto"]
    # Missing data show before the start, unless they are to be fetched.
    (repository / "work_dirs/job").mkdir(parents=True)
    (repository / "work_dirs/job/checkpoint.pth").touch()
    python = fake_python(repository / "bin", 0)
    assert f"{kind}: no folder data/{path}" in error(call(repository, kind, "job", arch, "student", 1, path=python))
    assert call(repository, kind, "job", arch, "student", 1, "--download", path=python).returncode == 0


def test_few_labels(repository):
    def found(*words, **variables):
        [command] = commands(repository, "imagenet_semi_cls", "job", "vit_small", "teacher", 1, *words, **variables)
        assert command[1] == "evaluation/semi_supervised/eval_cls.py" and flag(command, "--results_dir") == "work_dirs/job"
        return command[command.index("--data_path") + 1], flag(command, "--output_dir").removeprefix("work_dirs/job/")
    assert found() == ("data/imagenet_split", "semi_cls/teacher")
    # Subsets have a folder each.
    assert found(DATA_PATH="mine/1p/") == ("mine/1p/", "semi_cls/1p/teacher")
    assert found("--train_subset", "0.1", DATA_PATH="mine") == ("mine", "semi_cls/0.1/teacher")
    assert found("--train_subset", "lists/1percent.txt") == ("data/imagenet", "semi_cls/1percent.txt/teacher")
    assert found("--train_subset=0.1") == ("data/imagenet", "semi_cls/0.1/teacher")
    assert found("--data_path", "data/imagenet_1p_split/") == ("data/imagenet_1p_split/", "semi_cls/imagenet_1p_split/teacher")
    [command] = commands(repository, "imagenet_semi_cls", "job", "vit_small", "teacher", 1, "--resume", "auto", AVGPOOL="1")
    assert command[-10:] == ["--avgpool_patchtokens", "1", "--finetune_head_layer", "1", "--epochs", "1000", "--lr", "5e-6",
                             "--resume", "auto"]


def test_fine_tuning_with_other_tasks(repository):
    """It reads no kept features; after pre-training it has the recipe's own flags and starts over."""
    pretrain, knn, finetune, cifar = commands(repository, "imagenet_pretrain+imagenet_knn+imagenet_cls+cifar_cls", "job", "vit_small",
                                              "teacher", 1, "--epochs", "3")
    assert flag(pretrain, "--epochs") == "3" and not any("features" in word for word in knn + finetune + cifar)
    for command, epochs in ((finetune, "200"), (cifar, "1000")):
        assert flag(command, "--epochs") == epochs and command[-4:] == ["--load_from", "auto", "--overwrite", "true"]
    knn, linear, finetune = commands(repository, "imagenet_knn+imagenet_linear+imagenet_cls", "job", "vit_small", "teacher", 1)
    assert "--dump_features" in knn and "--dump_features" in linear and "--dump_features" not in finetune


def test_a_stopped_fine_tuning_says_how_to_go_on(repository):
    (repository / "work_dirs/job").mkdir(parents=True)
    (repository / "work_dirs/job/checkpoint.pth").touch()
    (repository / "data/cifar").mkdir(parents=True)
    result = call(repository, "cifar_cls", "job", "vit_small", "teacher", 1, path=fake_python(repository / "bin", 75))
    assert result.returncode == 75 and "cifar_cls was stopped (code 75); to go on: bash" in result.stderr


def test_videos(repository):
    """As the authors' README has it, with a folder of the masks, too; several keys have folders below it."""
    words = ("davis_viseg", "job", "vit_small", "teacher", 1)
    [command] = commands(repository, *words, DATA_PATH="imagenet's")
    assert command == ["python3", "evaluation/eval_video_segmentation.py", "--pretrained_weights", "work_dirs/job/checkpoint.pth",
                       "--checkpoint_key", "teacher", "--data_path", "data/davis/DAVIS", "--arch", "vit_small", "--output_dir",
                       "work_dirs/job", "--results_dir", "work_dirs/job"]
    [command] = commands(repository, *words, "--data_path", "data/davis", "--output_dir", ".viseg/")
    assert command[-4:] == ["--data_path", "data/davis", "--output_dir", ".viseg/"]
    assert command.count("--data_path") == 1 and flag(command, "--results_dir") == "work_dirs/job"
    for kind in ("imagenet_pretrain+davis_viseg", "imagenet_knn+davis_viseg"):
        assert "--output_dir cannot be passed on" in error(call(repository, kind, *words[1:], "--output_dir", "x", DRY_RUN="1"))
    (repository / "work_dirs/job").mkdir(parents=True)
    (repository / "work_dirs/job/checkpoint.pth").touch()
    assert "davis_viseg: no folder data/davis/DAVIS" in error(call(repository, *words))


def test_report(repository):
    assert commands(repository, "report", "my job") == [["python3", "evaluation/report.py", "--output_dir", "work_dirs/my job"]]
    [command] = commands(repository, "report", "job", OUTPUT_DIR="out")
    assert command[-1] == "out"
    assert "no folder work_dirs/job" in error(call(repository, "report", "job"))
    assert "./run.sh report JOB_NAME" in error(call(repository, "report"))
    [command] = commands(repository, "report", "a", "my job", "c")
    assert command[2:] == ["--output_dir", "work_dirs/a", "work_dirs/my job", "work_dirs/c"]
    (repository / "work_dirs/a").mkdir(parents=True)
    assert "no folder work_dirs/b" in error(call(repository, "report", "a", "b"))
    assert "OUTPUT_DIR names one folder" in error(call(repository, "report", "a", "b", OUTPUT_DIR="out"))


def test_processes_per_node(repository):
    def processes(gpus, **variables):
        [command] = commands(repository, "imagenet_pretrain", "job", "vit_small", "teacher", gpus, **variables)
        assert command[:3] == LAUNCH
        return flag(command, "--nproc_per_node")

    assert processes(3) == "3"
    assert processes(16) == "8"
    assert processes(16, MAX_GPUS="4") == "4"
    assert processes(16, GPUS_PER_NODE="2") == "2"


def test_several_nodes(repository):
    def on_node(node):
        return commands(repository, "imagenet_pretrain+imagenet_knn", "job", "vit_small", "a,b,c", 16, TOTAL_NODES="2",
                        NODE_ID=node, MASTER_ADDR="host", MASTER_PORT="1234")

    for node, keys in (("0", ["a", "c"]), ("1", ["b"])):
        pretrain, *evaluations = on_node(node)
        assert pretrain[3:14] == ["--nnodes", "2", "--node_rank", node, "--master_addr", "host", "--master_port",
                                  "1234", "--nproc_per_node", "8", "main_ibot.py"]
        # Nodes evaluate by themselves: waiting for the others, which have other keys, would never end.
        assert all("--standalone" in command and "--nnodes" not in command for command in evaluations)
        assert [flag(command, "--checkpoint_key") for command in evaluations] == keys


def test_called_from_another_folder(repository, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    [command] = commands(repository, "imagenet_knn", "job", "vit_small", "teacher", 1, cwd=elsewhere)
    assert str(repository / "evaluation/eval_knn.py") in command
    assert flag(command, "--data_path") == str(repository / "data/imagenet")
    assert flag(command, "--pretrained_weights") == str(repository / "work_dirs/job/checkpoint.pth")


def test_quickstart(repository):
    data, train, report = commands(repository, "quickstart", "--epochs", 2)
    assert data == ["python3", "analysis/quickstart.py", "data", "--output_dir", "data/digits"]
    assert train[:2] == ["python3", "main_ibot.py"] and train[-2:] == ["--epochs", "2"]
    assert flag(train, "--data_path") == "data/digits/train"
    assert flag(train, "--output_dir") == "work_dirs/quickstart" and flag(train, "--overwrite") == "true"
    assert flag(train, "--global_crops_size") == "16" and flag(train, "--koleo") == "0.5"
    assert report == ["python3", "analysis/quickstart.py", "report", "--output_dir", "work_dirs/quickstart"]


def test_quickstart_on_own_images(repository):
    train, report = commands(repository, "quickstart", "--data_path", "mine", "--output_dir=out")
    assert train[-3:] == ["--data_path", "mine", "--output_dir=out"] and flag(train, "--global_crops_size") == "64"
    assert train.count("--data_path") == 1 and "--output_dir" not in train
    assert "--overwrite" not in train  # what is in the user's own folder is not ours to delete
    assert report[-1] == "out"


def test_quickstart_resumed_keeps_what_is_there(repository):
    _, train, _ = commands(repository, "quickstart", "--load_from", "checkpoint.pth")
    assert "--overwrite" not in train


def test_test(repository):
    assert commands(repository, "test", "-k", "a or b") == [["python3", "-m", "pytest", "-q", "-n", "2", "tests", "-k", "a or b"]]


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("kind", ["foo", "imagenet_knn+foo", "imagenet_knn_", "imagenet_pretrain+", "imagenet"])
def test_unknown_type(repository, kind):
    line = error(call(repository, kind, "job", "vit_small", "teacher", 1))
    assert f"unknown TYPE '{kind.split('+')[-1]}'" in line
    assert all(known in line for known in ("quickstart", "report", "test", "imagenet_pretrain", *SCRIPTS))


def test_missing_arguments_are_named(repository):
    assert "missing after TYPE: JOB_NAME ARCH KEY GPUS;" in error(call(repository, "imagenet_knn"))
    assert "missing after TYPE: KEY GPUS;" in error(call(repository, "imagenet_knn", "job", "vit_small"))


@pytest.mark.parametrize("words, variables, expected", [
    (("vit_small", "teacher", "all"), {}, "GPUS must be"),
    (("vit_small", "teacher", "0"), {}, "GPUS must be"),
    (("vit_small", "", "1"), {}, "KEY"),
    (("vit_small", "teacher", "1"), {"TOTAL_NODES": "2", "NODE_ID": "2"}, "NODE_ID 2"),
    (("vit_small", "teacher", "1", "--output_dir", "x"), {}, "--output_dir cannot be passed on"),
    (("vit_small", "teacher", "1", "--results_dir=x"), {}, "--results_dir cannot be passed on"),
    (("vit_small", "teacher", "1"), {"PRETRAINED": "old.pth"}, "PRETRAINED is old.pth"),
])
def test_bad_values(repository, words, variables, expected):
    assert expected in error(call(repository, "imagenet_pretrain", "job", *words, DRY_RUN="1", **variables))


def test_missing_data_of_any_task_shows_before_the_first_starts(repository):
    (repository / "data/imagenet/train").mkdir(parents=True)
    assert "imagenet_knn: no folder data/imagenet/val" in error(
        call(repository, "imagenet_pretrain+imagenet_knn", "job", "vit_small", "teacher", 1))
    assert "imagenet_pretrain: no folder nowhere;" in error(
        call(repository, "imagenet_pretrain", "job", "vit_small", "teacher", 1, "--data_path", "nowhere"))


def test_missing_checkpoint(repository):
    for part in ("train", "val"):
        (repository / "data/imagenet" / part).mkdir(parents=True)
    assert "no checkpoint work_dirs/job/checkpoint.pth" in error(
        call(repository, "imagenet_knn", "job", "vit_small", "teacher", 1))


def test_no_arguments_and_help(repository):
    assert call(repository).returncode == 2
    for words in (["--help"], ["quickstart", "--help"], ["report", "--help"]):
        result = call(repository, *words)
        assert result.returncode == 0
        assert all(word in result.stdout for word in (*SCRIPTS, "report JOB_NAME", "MASTER_ADDR", "LINEAR_AVGPOOL"))


# ---------------------------------------------------------------- failures

def fake_python(folder, code):
    """Put a python3 into `folder` that notes its arguments in `folder`/calls and exits with `code`."""
    folder.mkdir()
    file = folder / "python3"
    file.write_text(f'#!/bin/sh\necho "$*" >> "{folder}/calls"\nexit {code}\n')
    file.chmod(0o755)
    return folder


def test_a_failed_evaluation_ends_the_command(repository):
    for part in ("train", "val"):
        (repository / "data/imagenet" / part).mkdir(parents=True)
    path = fake_python(repository / "bin", 0)
    (path / "python3").write_text(f'#!/bin/sh\necho "$*" >> "{path}/calls"\ncase "$*" in *eval_linear*student*) exit 3 ;; esac\n')
    result = call(repository, "imagenet_pretrain+imagenet_linear+imagenet_knn", "job", "vit_small", "teacher,student", 1, path=path)
    assert result.returncode == 3 and "imagenet_linear failed with code 3" in result.stderr
    assert ["main_ibot" in line or "eval_linear_multi" in line for line in (path / "calls").read_text().splitlines()] == [True] * 3


@pytest.mark.parametrize("code, started", [(7, 1), (0, 3)])
def test_failed_pretraining_starts_no_evaluation(repository, code, started):
    for part in ("train", "val"):
        (repository / "data/imagenet" / part).mkdir(parents=True)
    path = fake_python(repository / "bin", code)
    result = call(repository, "imagenet_pretrain+imagenet_knn", "job", "vit_small", "teacher,student", 1, path=path)
    assert result.returncode == code
    calls = (path / "calls").read_text().splitlines()
    assert len(calls) == started and "main_ibot.py" in calls[0]
    if code:
        assert "imagenet_pretrain failed with code 7" in result.stderr


TRAINING = """#!/bin/bash
# Says that it runs, and which signals come; saves for a moment, as main_ibot.py does, and ends with 75.
note() { echo "$1" >> "{folder}/calls"; }
for name in HUP INT TERM USR1; do trap "note $name; sleep 0.5; note saved; exit {code}" $name; done
note "$$ $*"
for i in {{1..600}}; do sleep 0.1; done
"""


def wait_for(path, text):
    for _ in range(600):
        if path.exists() and text in path.read_text():
            return path.read_text().splitlines()
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in {path}")


def ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def start(repository, gpus, *flags, code=75, kind="imagenet_pretrain+imagenet_knn"):
    """run.sh with a python that waits for signals: (process, file of its calls, process id of that python)."""
    for part in ("train", "val"):
        (repository / "data/imagenet" / part).mkdir(parents=True, exist_ok=True)
    (repository / "work_dirs/job").mkdir(parents=True)
    (repository / "work_dirs/job/checkpoint.pth").touch()
    folder = fake_python(repository / "bin", 0)
    script = TRAINING.replace("{folder}", str(folder)).replace("{code}", str(code)).replace("{{", "{").replace("}}", "}")
    (folder / "python3").write_text(script)
    process = subprocess.Popen(["bash", "run.sh", kind, "job", "vit_small", "teacher", str(gpus), *flags], cwd=repository,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(repository)})
    [line] = wait_for(folder / "calls", "vit_small")
    return process, folder / "calls", int(line.split()[0])


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "HUP"])
def test_signals_reach_training_and_its_code_comes_back(repository, name):
    """Sent to run.sh alone: training saves, run.sh waits for that, says how to go on and starts nothing more."""
    process, calls, pid = start(repository, 1, "--epochs", "3")
    process.send_signal(getattr(signal, f"SIG{name}"))
    _, message = process.communicate(timeout=30)
    assert process.returncode == 75
    assert calls.read_text().splitlines()[1:] == [name, "saved"] and ended(pid)
    assert message == ("run.sh: imagenet_pretrain was stopped (code 75); to go on: "
                       "bash run.sh imagenet_pretrain+imagenet_knn job vit_small teacher 1 --epochs 3\n")


def test_a_stopped_quickstart_says_how_to_go_on(repository):
    """The same command would start over."""
    path = fake_python(repository / "bin", 0)
    (path / "python3").write_text('#!/bin/sh\ncase "$*" in *main_ibot*) exit 75 ;; -c*) echo 1 ;; esac\n')
    result = call(repository, "quickstart", "--seed", 1, path=path)
    assert result.returncode == 75 and "report" not in result.stdout
    assert result.stderr.endswith("run.sh quickstart --seed 1, with --load_from auto\n"), result.stderr


def test_dense_demo_trains_from_both_starts_alike(repository):
    digits, scenes, *trainings, report = commands(repository, "dense_demo", "--seed", 1)
    assert digits[1:3] == ["analysis/quickstart.py", "data"] and scenes[1:3] == ["analysis/dense_demo.py", "data"]
    assert len(trainings) == 6
    for first, second in zip(trainings[::2], trainings[1::2], strict=True):
        assert flag(first, "--pretrained_weights") == "work_dirs/quickstart/checkpoint.pth"
        assert flag(second, "--pretrained_weights") == "random" and first[-2:] == ["--seed", "1"]
        assert [a for a, b in zip(first, second, strict=True) if a != b] == [
            flag(first, "--pretrained_weights"), flag(first, "--output_dir")]
    assert flag(report, "--output_dir") == "work_dirs/dense_demo"
    path = fake_python(repository / "bin", 0)
    assert "no checkpoint work_dirs/quickstart/checkpoint.pth; ./run.sh quickstart makes one" in error(
        call(repository, "dense_demo", path=path))


def test_dense_demo_ends_with_the_training_that_failed(repository):
    """It is the second, beside the first; what it printed is in a file."""
    (repository / "work_dirs/quickstart").mkdir(parents=True)
    (repository / "work_dirs/quickstart/checkpoint.pth").touch()
    path = fake_python(repository / "bin", 0)
    (path / "python3").write_text('#!/bin/sh\ncase "$*" in *detection*weights\\ random*) echo bad; exit 3 ;; esac\n')
    result = call(repository, "dense_demo", path=path)
    assert result.returncode == 3 and "segmentation/train" not in result.stdout and "dense_demo failed with code 3" in result.stderr
    assert (repository / "work_dirs/dense_demo/det/random.txt").read_text() == "bad\n"


def test_signals_reach_both_trainings_of_dense_demo(repository):
    """Ctrl-C too: run.sh waits until both have saved."""
    (repository / "work_dirs/quickstart").mkdir(parents=True)
    (repository / "work_dirs/quickstart/checkpoint.pth").touch()
    path = fake_python(repository / "bin", 0)
    (path / "python3").write_text('#!/bin/bash\ncase "$*" in *detection/train*) trap "sleep 0.3; echo saved; exit 75" TERM\n'
                                  'echo started; for i in {1..300}; do sleep 0.1; done ;; esac\n')
    process = subprocess.Popen(["bash", "run.sh", "dense_demo"], cwd=repository, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(repository)})
    assert "started\n" in process.stdout  # reads to that line
    other = repository / "work_dirs/dense_demo/det/random.txt"
    end = time.monotonic() + 30
    while not (other.exists() and other.read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, message = process.communicate(timeout=60)
    assert process.returncode == 75 and out.splitlines()[-1] == "saved" and other.read_text().splitlines()[-1] == "saved"
    assert "dense_demo was stopped (code 75)" in message


def test_several_signals(repository):
    """Schedulers repeat themselves while the run saves."""
    process, calls, pid = start(repository, 1, "--overwrite", "true")
    for name in ("USR1", "TERM", "TERM"):
        process.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.15)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 75 and "saved" in calls.read_text() and ended(pid)
    assert message.endswith("--overwrite true, without --overwrite\n")


def test_the_launcher_gets_sigterm_for_sigusr1(repository):
    """torch.distributed.run would die of SIGUSR1 and leave its processes behind."""
    process, calls, pid = start(repository, 2, code=1)  # to the launcher any failure is 1
    process.send_signal(signal.SIGUSR1)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 1 and calls.read_text().splitlines()[1:] == ["TERM", "saved"] and ended(pid)
    assert "was stopped (code 1); to go on: " in message


@pytest.mark.parametrize("kind", ["imagenet_pretrain+imagenet_knn", "imagenet_knn"])
def test_nothing_starts_after_a_signal(repository, kind):
    """Even when the task ends well all the same."""
    process, calls, pid = start(repository, 1, code=0, kind=kind)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and ended(pid)
    assert len(calls.read_text().splitlines()) == 3 and ("to go on" in message) == ("pretrain" in kind)


def test_a_killed_process_is_a_failure(repository):
    process, calls, pid = start(repository, 1)
    os.kill(pid, signal.SIGKILL)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 137 and "imagenet_pretrain failed with code 137" in message


def test_preempted_by_others(repository):
    """The scheduler signalled training itself: its code alone says so."""
    path = fake_python(repository / "bin", 75)
    (repository / "data/imagenet/train").mkdir(parents=True)
    result = call(repository, "imagenet_pretrain", "my job", "vit_small", "teacher", 1, path=path)
    assert result.returncode == 75
    assert result.stderr.startswith("run.sh: imagenet_pretrain was stopped (code 75); to go on: ")
    assert result.stderr.endswith("run.sh imagenet_pretrain my\\ job vit_small teacher 1\n")


def test_python_too_old(repository):
    path = fake_python(repository / "bin", 1)
    assert "Python 3.10 or newer is needed" in error(call(repository, "quickstart", path=path))
