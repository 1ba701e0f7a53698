"""What a shared page shows of the command that made it."""

from __future__ import annotations

import shlex

import pytest

from relu_doctor.reports.redaction import redacted, redacted_texts, without_home


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("scan --token abc x.pt", "scan --token [redacted] x.pt"),
        ("scan --token=abc x.pt", "scan --token=[redacted] x.pt"),
        ("scan --hf-token --trust x.pt", "scan --hf-token --trust x.pt"),
        ("scan --model-arg api_key=abc", "scan --model-arg api_key=[redacted]"),
        ("PASSWORD=abc scan", "PASSWORD=[redacted] scan"),
        ("scan --header Authorization:abc --auth abc", "scan --header Authorization:[redacted] --auth [redacted]"),
        ("scan --data https://ann:abc@host/a.npy", "scan --data 'https://[redacted]@host/a.npy'"),
        ("scan --data 's3://host/a.npy?X-Sig=abc&b=1'", "scan --data 's3://host/a.npy?[redacted]'"),
        ("scan --data=https://host/a.npy?sig=abc", "scan '--data=https://host/a.npy?[redacted]'"),
        ("scan hf_abcdefghijklmnop", "scan [redacted]"),
        ("scan --model-arg key=AKIAIOSFODNN7EXAMPLE", "scan --model-arg key=[redacted]"),
        ("scan --model-arg id=0123456789abcdef0123456789abcdef", "scan --model-arg id=[redacted]"),
        ("scan /home/ann/x.pt /Users/ann/y.pt /root/z.pt", "scan ~/x.pt ~/y.pt ~/z.pt"),
        ("scan 'C:\\Users\\ann\\x.pt'", "scan '~\\x.pt'"),
        ("scan /mnt/home/ann/x /export/home/ann/y ~ann/z", "scan ~/x ~/y ~/z"),
    ],
)
def test_secrets_and_homes_are_taken_out(command, shown):
    """Values of arguments whose names speak of secrets, tokens, what stands in addresses, home directories."""
    assert redacted(command) == shown.replace("'https://[redacted]@host/a.npy'", "https://[redacted]@host/a.npy")
    assert redacted(shlex.split(command)) == redacted(command)
    assert "ann" not in redacted(command)


@pytest.mark.parametrize(
    "command",
    [
        "relu-doctor scan runs/exp1/step4000.pt --model mynet.py:make_net --data validation.npy",
        "relu-doctor scan net.pt --evidence token --max-inputs 5000 --model-arg depth=18",
        "relu-doctor scan net.pt --model-arg max_tokens=512 --model-arg vocab_tokens=3 --data random:3x32x32",
        "relu-doctor report /data/home/x --format html",
        "relu-doctor scan net.pt --model token.py:make_net --forward secretmod:fwd --rectifier=secretary.py:Net",
        "relu-doctor scan net.pt --model password_strength.net:make --data tokendata:batches",
        "relu-doctor scan sk-learn-digits.pt sk-resnet50-imagenet.pt --model-arg token_dim=64 --model-arg signature=1",
        "relu-doctor scan checkpoint-0123456789-abcdef-very-long-name-of-a-run-7.safetensors",
    ],
)
def test_what_is_no_secret_stays(command):
    """The command can still be read, and run again."""
    assert redacted(command) == command


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--model-arg=api_key=HIDE"], "--model-arg=api_key=[redacted]"),
        (["--model-arg", "dsn=host=db;password=HIDE"], "--model-arg 'dsn=host=db;password=[redacted]'"),
        (["--model-arg", "dsn=password=HIDE,ME;host=db"], "--model-arg 'dsn=password=[redacted];host=db'"),
        (["opts=user:bob,password:HIDE"], "opts=user:bob,password:[redacted]"),
        (['opts={"password": "HIDE", "depth": 3}'], """'opts={"password": [redacted], "depth": 3}'"""),
        (["-H", "Authorization: Bearer HIDE"], "-H 'Authorization: [redacted]'"),
        (["-H", "Authorization:", "Bearer", "HIDE"], "-H Authorization: [redacted] [redacted]"),
        (["--pass", "HIDE"], "--pass [redacted]"),
        (["https://user:HIDE@HIDE@host/x"], "https://[redacted]@host/x"),
        (["https://h/x#token=HIDE"], "'https://h/x#[redacted]'"),
        (["s3://AKIA0123:HIDE/ME+x@bucket/y"], "s3://[redacted]@bucket/y"),
        (["id=HIDErXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"], "id=[redacted]"),
        (["--data", "bob:HIDE@host:/data"], "--data '[redacted]@host:/data'"),
        (["dckr_pat_HIDE56789", "SG.HIDE567.HIDE567"], "[redacted] [redacted]"),
        (["https://hooks.slack.com/services/T0/B0/HIDE"], "https://hooks.slack.com/services/[redacted]"),
        (["sk-HIDE567890abcdefghij", "sk-proj-HIDE-abc_defghi"], "[redacted] [redacted]"),
    ],
)
def test_secrets_are_found_wherever_they_are_nested(words, shown):
    """Behind any number of signs, in lists, headers and addresses."""
    found = redacted(words)
    assert "HIDE" not in found
    assert found.replace("'[redacted]@host:/data'", "[redacted]@host:/data") == shown.replace(
        "'[redacted]@host:/data'", "[redacted]@host:/data"
    )


def test_the_own_home_is_taken_out_wherever_it_lies(monkeypatch):
    """A home directory need not be below /home."""
    monkeypatch.setenv("HOME", "/scratch/u/ann")
    assert without_home("at /scratch/u/ann/x.pt, /scratch/u/anna/y") == "at ~/x.pt, /scratch/u/anna/y"
    monkeypatch.setenv("HOME", "/")
    assert without_home("/data/x") == "/data/x"


def test_texts_lose_homes_and_tokens_and_keep_the_names_of_sites():
    """However deep they lie."""
    told = {"details": ("Data: /home/ann/x.npy, https://a:b@h/y?z=1",), "site": "/home/ann", "steps": 3}
    assert redacted_texts(told) == {
        "details": ["Data: ~/x.npy, https://[redacted]@h/y?[redacted]"],
        "site": "/home/ann",
        "steps": 3,
    }


def test_an_open_quotation_is_no_error():
    """What no shell would take is shown as it can be."""
    assert "scan" in redacted("scan 'x")


def test_a_title_has_no_home():
    """Also in the middle of a text."""
    assert without_home("runs of /home/ann/exp1, /root and /home/bob") == "runs of ~/exp1, ~ and ~"
