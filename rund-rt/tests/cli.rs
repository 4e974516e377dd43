//! The command-line tool, as people and scripts use it.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::fs::File;
use std::process::{Command, Output, Stdio};

use carlsbad_kit::capability::Capability;
use serde_json::Value;

use common::{BUSYBOX, root, text};

fn rund(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rund"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Output {
    rund(arguments).output().unwrap()
}

#[test]
fn every_command_has_help() {
    for command in ["run", "template build", "probe", "storm", "ps", "stats"] {
        let mut words: Vec<&str> = command.split(' ').collect();
        words.push("--help");
        let help = output(&words);
        assert!(help.status.success(), "{command}");
        assert!(text(&help.stdout).contains("Usage: rund"), "{command}");
    }
}

#[test]
fn a_program_runs_and_says_what_it_used() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let root = root();
    let dir = root.path().to_str().unwrap();
    let run = output(&[
        "run",
        "--root",
        dir,
        "--json",
        "--stats",
        "/bin/busybox",
        "sh",
        "-c",
        "echo out; exit 7",
    ]);
    assert_eq!(run.status.code(), Some(7), "{}", text(&run.stderr));
    assert_eq!(text(&run.stdout), "out\n");
    let stats: Value = serde_json::from_slice(&run.stderr).unwrap();
    assert_eq!(stats["backend"], "kvm-elf");
    assert!(stats["isolation"].as_str().unwrap().ends_with("-vm"));
    assert!(stats["cpu_seconds"].is_null());
}

#[test]
fn a_limit_makes_a_control_group() {
    carlsbad_kit::require!(
        Capability::Kvm,
        Capability::Busybox,
        Capability::Root,
        Capability::ControlGroups
    );
    let root = root();
    let dir = root.path().to_str().unwrap();
    for backend in ["kvm-elf", "process"] {
        let run = output(&[
            "run",
            "--backend",
            backend,
            "--root",
            dir,
            "--max-processes",
            "20",
            "--json",
            "--stats",
            "/bin/busybox",
            "true",
        ]);
        assert!(run.status.success(), "{}", text(&run.stderr));
        let stats: Value = serde_json::from_slice(&run.stderr).unwrap();
        assert_eq!(stats["backend"], backend);
        assert_eq!(stats["pooled_cgroup"], true);
    }
}

#[test]
fn nobody_listening_is_no_panic() {
    for arguments in [&["ps"][..], &["stats", "--json"], &["ps", "--json"]] {
        // A reader that has gone, and a disk that is full.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let gone = rund(arguments).stdout(writer).output().unwrap();
        assert!(gone.status.success(), "{}", text(&gone.stderr));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let full = rund(arguments).stdout(full).output().unwrap();
        assert_eq!(full.status.code(), Some(125));
        let said = text(&full.stderr);
        assert!(said.contains("cannot write to standard output"), "{said}");
    }
}

#[test]
fn what_is_wrong_has_a_kind_and_a_code() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let cases: [(&[&str], i32, &str); 4] = [
        (&["run", "--json", "/nowhere"], 122, "bad_program"),
        (&["run", "--json", "/etc/passwd"], 122, "bad_program"),
        (
            &["run", "--json", "--template", "/etc/passwd"],
            122,
            "bad_program",
        ),
        (
            &["run", "--json", "--cpus", "0", BUSYBOX, "true"],
            123,
            "bad_setting",
        ),
    ];
    for (arguments, code, kind) in cases {
        let failed = output(arguments);
        let said = text(&failed.stderr);
        assert_eq!(failed.status.code(), Some(code), "{arguments:?}: {said}");
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["kind"], kind, "{said}");
    }
}

#[test]
fn a_storm_gives_each_its_input_and_says_how_they_ended() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let root = root();
    let dir = root.path().to_str().unwrap();
    let words = root.path().join("data/words");
    let words = words.to_str().unwrap();
    let storm = |program: &[&str]| {
        let mut arguments = vec![
            "storm", "--json", "-n", "3", "--root", dir, "--input", words,
        ];
        arguments.extend_from_slice(program);
        output(&arguments)
    };
    let good = storm(&["/bin/busybox", "grep", "fig"]);
    assert!(good.status.success(), "{}", text(&good.stderr));
    let said: Value = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!((&said["wrong"], &said["exit_code"]), (&0.into(), &0.into()));
    let bad = storm(&["/bin/busybox", "grep", "nothing"]);
    assert_eq!(bad.status.code(), Some(1));
    let said: Value = serde_json::from_slice(&bad.stdout).unwrap();
    assert_eq!((&said["wrong"], &said["exit_code"]), (&0.into(), &1.into()));
}
