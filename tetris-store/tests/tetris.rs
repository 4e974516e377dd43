//! The command-line tool, as a user runs it.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{random_bytes, scratch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::Value;
use tempfile::TempDir;

struct Shell {
    dir: TempDir,
    agent: Option<PathBuf>,
}

impl Shell {
    fn new() -> Self {
        let dir = scratch();
        Self { dir, agent: None }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tetris"));
        command
            .args(arguments)
            .env("TETRIS_STORE", self.dir.path().join("store"))
            .env_remove("TETRIS_AGENT");
        if let Some(agent) = &self.agent {
            command.env("TETRIS_AGENT", agent);
        }
        command
    }

    /// Runs the tool, which must end with `code`.
    fn run(&self, code: i32, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "tetris {arguments:?}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        output
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let all = [&["--json"], arguments].concat();
        serde_json::from_slice(&self.run(0, &all).stdout).unwrap()
    }

    /// A model whose tensor `shared` follows from `base` and whose tensor `own` from `own`.
    fn model(&self, name: &str, base: u64, own: u64) -> String {
        let path = self.dir.path().join(name);
        let (shared, own) = (random_bytes(300_000, base), random_bytes(100_000, own));
        let view = |bytes| TensorView::new(Dtype::U8, vec![<[u8]>::len(bytes)], bytes).unwrap();
        serialize_to_file(
            [("shared", view(&shared)), ("own", view(&own))],
            None,
            &path,
        )
        .unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn names(&self) -> Vec<String> {
        let list = self.json(&["ls"]);
        let labels = list.as_array().unwrap().iter().map(|it| &it["labels"][0]);
        labels.map(|it| it.as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn the_whole_tour_without_an_agent() {
    let shell = Shell::new();
    let missing = shell.run(1, &["ls"]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("ingest a model"));
    assert!(
        !shell.dir.path().join("store").exists(),
        "looking made a store"
    );

    let (a, b) = (shell.model("a", 1, 2), shell.model("b", 1, 3));
    shell.run(0, &["ingest", &a, "--label", "base"]);
    let second = shell.json(&["ingest", &b, "--label", "tuned"]);
    assert_eq!(second[0]["written"], 100_000);
    let mut names = shell.names();
    names.sort();
    assert_eq!(names, ["base", "tuned"]);

    let show = shell.json(&["show", "tuned"]);
    assert_eq!(show["manifest"]["tensors"].as_array().unwrap().len(), 2);
    assert_eq!(show["id"], second[0]["model"]);
    let overlap = shell.json(&["overlap", "tuned", "base"]);
    assert_eq!(
        (&overlap["shared"], &overlap["missing"]),
        (&300_000.into(), &100_000.into())
    );
    let stats = shell.json(&["stats"]);
    assert_eq!(
        (&stats["models"], &stats["private"]),
        (&2.into(), &800_000.into())
    );

    let view = shell.dir.path().join("store/views/v");
    let exported = shell.json(&["view", "base", "hf-sharded", view.to_str().unwrap()]);
    assert_eq!(exported["linked"], 400_000);
    assert!(view.join("model.safetensors.index.json").exists());
    fs::remove_dir_all(&view).unwrap();

    shell.run(0, &["label", "other", "base"]);
    shell.run(0, &["rm", "other"]);
    shell.run(3, &["rm", "other"]);
    shell.run(3, &["show", "nobody"]);
    shell.run(2, &["show"]);
    shell.run(2, &["reclaim", "--keep-alive", "soon"]);
    shell.run(1, &["ingest", "/proc/self/status"]);
    shell.run(5, &["ingest", &shell.model("c", 8, 9), "--quota", "1KiB"]);
    shell.run(0, &["verify"]);
    for human in [
        &["ls"][..],
        &["show", "base"],
        &["stats"],
        &["overlap", "base", "tuned"],
        &["help", "plan"],
    ] {
        assert!(!shell.run(0, human).stdout.is_empty());
    }
    let freed = shell.json(&["reclaim", "--keep-alive", "0s"]);
    assert_eq!(freed["freed"].as_array().unwrap().len(), 2);
}

#[test]
fn verify_finds_a_flipped_bit_and_discard_takes_it_out() {
    let shell = Shell::new();
    shell.run(0, &["ingest", &shell.model("a", 1, 2), "--label", "base"]);
    let mut objects = Vec::new();
    for entry in fs::read_dir(shell.dir.path().join("store/objects")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            objects.extend(fs::read_dir(path).unwrap().map(|it| it.unwrap().path()));
        }
    }
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&objects[0], fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&objects[0])
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5_000).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 5_000).unwrap();
    let found = shell.run(1, &["verify", "--discard"]);
    assert!(String::from_utf8_lossy(&found.stdout).contains("damaged file"));
    shell.run(0, &["ingest", &shell.model("a", 1, 2)]);
    shell.run(0, &["verify"]);
}

/// `attach`, once its command runs.
fn attached(shell: &Shell, script: &str) -> Child {
    let script = format!("echo $TETRIS_MODEL; {script}");
    let mut child = shell
        .command(&["attach", "base", "--", "sh", "-c", &script])
        .stdout(Stdio::piped())
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut id = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut id)
        .unwrap();
    assert_eq!(id.trim().len(), 64);
    child
}

#[test]
fn attach_keeps_the_model_for_as_long_as_its_command_runs_and_ends_as_it_does() {
    let shell = Shell::new();
    shell.run(0, &["ingest", &shell.model("a", 1, 2), "--label", "base"]);
    let mut child = attached(&shell, "read line; exit 7");
    assert!(shell.json(&["ls"])[0]["idle_seconds"].is_null());
    let kept = shell.json(&["reclaim", "--keep-alive", "0s"]);
    assert_eq!(kept["leased"], 1);
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(7));

    // Killed: the lease goes with it.
    let mut child = attached(&shell, "exec sleep 600");
    assert_eq!(shell.json(&["reclaim", "--keep-alive", "0s"])["leased"], 1);
    child.kill().unwrap();
    child.wait().unwrap();
    let freed = shell.json(&["reclaim", "--keep-alive", "0s"]);
    assert_eq!(freed["freed"].as_array().unwrap().len(), 1);
    shell.run(3, &["attach", "base", "--", "true"]);
}

/// `serve`, once it serves; stopped by drop.
struct Serving(Child);

impl Serving {
    fn start(shell: &mut Shell, arguments: &[&str]) -> Self {
        let socket = shell.dir.path().join("socket");
        let all = [&["serve", "--socket", socket.to_str().unwrap()], arguments].concat();
        let mut child = shell
            .command(&all)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.contains("serving at"), "{line}");
        shell.agent = Some(socket);
        Self(child)
    }

    fn stop(mut self, signal: Signal) -> Option<i32> {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
        self.0.wait().unwrap().code()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_same_commands_with_an_agent_which_sweeps_by_itself() {
    let mut shell = Shell::new();
    let agent = Serving::start(&mut shell, &["--keep-alive", "4s", "--sweep-every", "50ms"]);
    shell.run(0, &["ingest", &shell.model("a", 1, 2), "--label", "base"]);
    let mut child = attached(&shell, "read line; exit 7");
    assert_eq!(shell.names(), ["base"]);
    assert_eq!(shell.json(&["stats"])["store"]["models"], 1);
    shell.run(0, &["view", "base", "hf-sharded", "mine"]);
    shell.run(0, &["label", "other", "base"]);
    shell.run(0, &["rm", "other"]);
    shell.run(3, &["show", "other"]);
    thread::sleep(Duration::from_millis(4_500));
    assert_eq!(shell.names(), ["base"], "reclaimed while leased");
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(7));
    let start = Instant::now();
    while !shell.names().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(30), "never reclaimed");
        thread::sleep(Duration::from_millis(50));
    }
    // A second one does not start; a killed one is replaced; both signals stop it.
    shell.run(
        6,
        &[
            "serve",
            "--socket",
            shell.agent.as_ref().unwrap().to_str().unwrap(),
        ],
    );
    drop(agent);
    shell.run(6, &["ls"]);
    let agent = Serving::start(&mut shell, &[]);
    assert_eq!(agent.stop(Signal::SIGTERM), Some(0));
    assert!(!shell.agent.as_ref().unwrap().exists());
    let agent = Serving::start(&mut shell, &[]);
    assert_eq!(agent.stop(Signal::SIGINT), Some(0));
}

#[test]
fn plan_places_what_fits_and_says_what_does_not() {
    let shell = Shell::new();
    shell.run(0, &["ingest", &shell.model("a", 1, 2), "--label", "base"]);
    let plan = |cpus: u32| {
        let row = serde_json::json!({
            "cpus": 1, "memory": 1_000_000, "batch": 4, "concurrency": 1, "latency_s": 0.02
        });
        let function = |name: &str, tensors: Value| {
            let mut function = serde_json::json!({
                "name": name, "profile": [row], "slo_s": 0.1, "rps": 300.0
            });
            let source = if tensors.is_string() {
                "model"
            } else {
                "tensors"
            };
            function[source] = tensors;
            function
        };
        let input = serde_json::json!({
            "nodes": [{ "name": "n", "cpus": cpus, "memory": 1_000_000_000u64 }],
            "functions": [
                function("stored", "base".into()),
                function("given", serde_json::json!([["x", 5000]])),
            ]
        });
        let path = shell.dir.path().join(format!("plan{cpus}.json"));
        fs::write(&path, input.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let made = shell.json(&["plan", &plan(8)]);
    assert_eq!(made["instances"].as_array().unwrap().len(), 4);
    assert_eq!(made["nodes"][0]["tensor_bytes"], 405_000);
    assert!(
        !shell
            .run(0, &["plan", &plan(8), "--placement", "pairwise"])
            .stdout
            .is_empty()
    );
    let refused = shell.run(5, &["plan", &plan(1)]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("add machines"));
    shell.run(1, &["plan", "/nowhere"]);
}

#[test]
fn a_reader_who_stops_reading_is_no_failure() {
    let shell = Shell::new();
    shell.run(0, &["ingest", &shell.model("a", 1, 2), "--label", "base"]);
    let mut child = shell
        .command(&["--json", "show", "base"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert_eq!(said, "");
}

#[test]
fn json_has_times_in_seconds_and_errors_as_objects() {
    let shell = Shell::new();
    let refused = |code, kind: &str, arguments: &[&str]| {
        let output = shell.run(code, &[arguments, &["--json"]].concat());
        assert!(output.stdout.is_empty(), "{arguments:?}");
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!(error["kind"], kind, "{arguments:?}");
        assert!(!error["error"].as_str().unwrap().is_empty());
    };
    refused(1, "failed", &["ls"]);
    shell.run(0, &["ingest", &shell.model("a", 1, 2), "--label", "base"]);
    let idle = shell.json(&["ls"])[0]["idle_seconds"].as_f64().unwrap();
    assert!((0.0..60.0).contains(&idle), "{idle}");
    let due = &shell.json(&["reclaim", "--keep-alive", "1h"])["next_due_seconds"];
    assert!(
        (3_000.0..=3_600.0).contains(&due.as_f64().unwrap()),
        "{due}"
    );
    refused(3, "no_such_model", &["show", "nobody"]);
    refused(2, "bad_usage", &["show"]);
    let large = shell.model("c", 8, 9);
    refused(5, "no_room", &["ingest", &large, "--quota", "1KiB"]);
    refused(6, "unavailable", &["ls", "--agent", "/nowhere/socket"]);
    // What came before the failure is told.
    let some = shell.run(
        1,
        &["--json", "ingest", &shell.model("d", 1, 4), "/nowhere"],
    );
    let done: Value = serde_json::from_slice(&some.stdout).unwrap();
    assert_eq!(done[0]["written"], 100_000);
}

#[test]
fn verify_and_attach_with_an_agent_are_about_its_store() {
    let mut shell = Shell::new();
    let agent = Serving::start(&mut shell, &["--keep-alive", "1h"]);
    shell.run(0, &["ingest", &shell.model("a", 1, 2), "--label", "base"]);
    let socket = shell.agent.take().unwrap();
    let socket = socket.to_str().unwrap();
    // The environment names another store, which does not exist.
    let elsewhere = shell.dir.path().join("elsewhere");
    let run = |arguments: &[&str]| {
        let mut command = shell.command(arguments);
        command.env("TETRIS_STORE", &elsewhere).output().unwrap()
    };
    let found = run(&["--json", "verify", "--agent", socket]);
    assert!(found.status.success(), "{found:?}");
    let report: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!(report["sound"], 2);
    let script = "echo $TETRIS_STORE; echo $TETRIS_AGENT";
    let told = run(&[
        "attach", "--agent", socket, "base", "--", "sh", "-c", script,
    ]);
    let told = String::from_utf8(told.stdout).unwrap();
    let store = shell.dir.path().join("store");
    assert_eq!(told, format!("{}\n{socket}\n", store.display()));
    assert!(!elsewhere.exists());
    // Both at once is a contradiction, and a store that is named is the one that is meant.
    shell.run(2, &["ls", "--agent", socket, "--store", "/nowhere"]);
    let mut named = shell.command(&["ls", "--store", "/nowhere"]);
    let named = named.env("TETRIS_AGENT", socket).output().unwrap();
    assert_eq!(named.status.code(), Some(1), "{named:?}");
    drop(agent);
}

#[test]
fn an_error_names_its_cause_once() {
    let shell = Shell::new();
    fs::write(shell.dir.path().join("store"), "in the way").unwrap();
    let output = shell.run(1, &["ingest", &shell.model("model.safetensors", 1, 2)]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.matches("os error").count(), 1, "{text}");
}
