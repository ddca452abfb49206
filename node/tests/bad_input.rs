//! Bad input: a clear error that names the thing, the value and the way out; nothing written, nobody else harmed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{agents, cluster};

fn weft(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn agent(config: &Path) -> Output {
    weft(&["agent", "--config", config.to_str().unwrap()])
}

#[test]
fn an_unknown_configuration_key_is_refused_with_the_nearest_name() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("agent.toml");
    fs::write(
        &config,
        "name = \"n1\"\ndata_dir = \"/nowhere\"\nmetrics_lisen = \"127.0.0.1:1\"\n",
    )
    .unwrap();
    let output = agent(&config);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("unknown key `metrics_lisen`; did you mean `metrics_listen`?"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_configuration_that_is_missing_is_named() {
    let output = agent(Path::new("/nowhere/agent.toml"));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("/nowhere/agent.toml"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn an_agent_that_does_not_answer_is_exit_code_5_and_usage_is_2() {
    let output = weft(&["init", "--agent", "127.0.0.1:9", "--name", "x"]);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).contains("127.0.0.1:9"), "{}", stderr(&output));
    assert_eq!(
        weft(&["volume", "create", "v", "--size", "10KiB"]).status.code(),
        Some(2)
    );
    assert_eq!(weft(&["volum"]).status.code(), Some(2));
}

#[test]
fn a_drive_that_is_too_small_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let agents = agents(folder.path(), 1, 8);
    let address = agents.control_addresses()[0].clone();
    agents
        .wait_until("the agent answers", |agents| {
            agents
                .weft(&["init", "--agent", &address, "--name", "x"])
                .is_ok_and(|output| output.status.code() == Some(4))
        })
        .unwrap();
    let output = agents
        .weft(&["init", "--agent", &address, "--name", "x"])
        .unwrap();
    let sentence = stderr(&output);
    assert!(
        sentence.contains("drive1.img") && sentence.contains("needs at least"),
        "{sentence}"
    );
}

#[test]
fn a_drive_of_another_cluster_is_refused_without_force_and_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a"), folder.path().join("b"));
    let mut owner = cluster(&first, 1, 128);
    owner.kill(0).unwrap();
    let drive = owner.list[0].config.drives[0].path.clone();
    let before = fs::read(&drive).unwrap();

    let mut thief = agents(&second, 1, 128);
    thief.kill(0).unwrap();
    fs::copy(&drive, &thief.list[0].config.drives[0].path).unwrap();
    thief.start(0).unwrap();
    let address = thief.control_addresses()[0].clone();
    let init = ["init", "--agent", address.as_str(), "--name", "other"];
    thief
        .wait_until("the agent answers", |agents| {
            agents
                .weft(&init)
                .is_ok_and(|output| output.status.code() == Some(4))
        })
        .unwrap();
    let sentence = stderr(&thief.weft(&init).unwrap());
    assert!(
        sentence.contains("belongs to cluster") && sentence.contains("--force"),
        "{sentence}"
    );
    let after = fs::read(&thief.list[0].config.drives[0].path).unwrap();
    assert!(before == after, "a refused drive was written to");

    thief
        .weft_ok(&["init", "--agent", &address, "--name", "other", "--force"])
        .unwrap();
    thief.wait_for_drives(1).unwrap();
}

#[test]
fn a_second_agent_on_the_same_drives_is_locked_out() {
    let folder = tempfile::tempdir().unwrap();
    let agents = agents(folder.path(), 1, 128);
    agents
        .wait_until("the agent has its drives", |agents| {
            let drive = fs::File::open(&agents.list[0].config.drives[0].path);
            drive.is_ok_and(|drive| drive.try_lock().is_err())
        })
        .unwrap();
    let config = &agents.list[0].config;
    let text = format!(
        "name = \"n2\"\ndata_dir = {:?}\ncontrol_listen = \"127.0.0.1:0\"\nnvme_listen = \"127.0.0.1:0\"\n\
         discovery_listen = \"127.0.0.1:0\"\nmetrics_listen = \"127.0.0.1:0\"\n[[drive]]\npath = {:?}\n",
        folder.path().join("second"),
        config.drives[0].path
    );
    let second = folder.path().join("second.toml");
    fs::write(&second, text).unwrap();
    let output = agent(&second);
    assert_eq!(output.status.code(), Some(1));
    let sentence = stderr(&output);
    assert!(
        sentence.contains("drive1.img") && sentence.contains("in use"),
        "{sentence}"
    );
}

#[test]
fn what_the_cluster_cannot_hold_is_refused_and_it_says_what_would_fit() {
    let folder = tempfile::tempdir().unwrap();
    let agents = cluster(folder.path(), 3, 128);
    let refuse = |arguments: &[&str]| {
        let output = agents.weft(arguments).unwrap();
        (output.status.code(), stderr(&output))
    };
    let (code, sentence) = refuse(&["volume", "create", "v", "--size", "64MiB", "--ec", "4+2"]);
    assert_eq!(code, Some(4), "{sentence}");
    assert!(
        sentence.contains("3 failure domains available, 6 needed; 1+2 would fit"),
        "{sentence}"
    );
    let (code, sentence) = refuse(&["volume", "create", "v", "--size", "1024TiB", "--ec", "1+2"]);
    assert_eq!(code, Some(4), "{sentence}");
    // 16 TiB: what a volume with one data shard can keep account of.
    assert!(
        sentence.contains("largest 1+2 volume, 17592186044416"),
        "{sentence}"
    );
    let (code, sentence) = refuse(&["volume", "show", "nothing"]);
    assert_eq!(code, Some(3), "{sentence}");
    assert!(sentence.contains("no volume is called `nothing`"), "{sentence}");
    let (code, sentence) = refuse(&["volume", "create", "Bad_Name", "--size", "64MiB"]);
    assert_eq!(code, Some(1), "{sentence}");
    assert!(sentence.contains("Bad_Name"), "{sentence}");
    agents
        .weft_ok(&["volume", "create", "v", "--size", "64MiB", "--ec", "1+2"])
        .unwrap();
    let (code, sentence) = refuse(&["volume", "resize", "v", "--size", "32MiB"]);
    assert_eq!(code, Some(4), "{sentence}");
    assert!(sentence.contains("do not shrink"), "{sentence}");
}
