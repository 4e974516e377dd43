//! A real containerd runs containers through the shim, and hears of them what it would hear of
//! runc.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::scratch;
use serde_json::{Value, json};

const BUSYBOX: &str = "/bin/busybox";
const IMAGE: &str = "rund.test/box:1";
const PATIENCE: Duration = Duration::from_secs(60);

fn sha256(path: &Path) -> String {
    let done = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(done.stdout).unwrap()[..64].to_owned()
}

/// An image of busybox, as an OCI archive.
fn image(dir: &Path) -> PathBuf {
    let layer = dir.join("layer.tar");
    let mut tar = tar::Builder::new(fs::File::create(&layer).unwrap());
    let header = |kind, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_mtime(0);
        header.set_size(size);
        header
    };
    for name in ["bin", "proc", "dev", "tmp"] {
        let mut header = header(tar::EntryType::Directory, 0);
        tar.append_data(&mut header, name, &[][..]).unwrap();
    }
    let program = fs::read(BUSYBOX).unwrap();
    let mut file = header(tar::EntryType::Regular, program.len() as u64);
    tar.append_data(&mut file, "bin/busybox", &program[..])
        .unwrap();
    for name in ["sh", "cat", "sleep", "echo"] {
        let mut link = header(tar::EntryType::Symlink, 0);
        tar.append_link(&mut link, format!("bin/{name}"), "/bin/busybox")
            .unwrap();
    }
    tar.finish().unwrap();

    let blob = |bytes: &[u8]| {
        let path = dir.join("blob");
        fs::write(&path, bytes).unwrap();
        (sha256(&path), bytes.to_vec())
    };
    let layer = blob(&fs::read(&layer).unwrap());
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", layer.0)]}
    });
    let config = blob(config.to_string().as_bytes());
    let describe = |kind: &str, (digest, bytes): &(String, Vec<u8>)| {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{digest}"),
            "size": bytes.len()
        })
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": describe("config.v1+json", &config),
        "layers": [describe("layer.v1.tar", &layer)]
    });
    let manifest = blob(manifest.to_string().as_bytes());
    let mut entry = describe("manifest.v1+json", &manifest);
    entry["annotations"] = json!({"io.containerd.image.name": IMAGE});
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string();

    let path = dir.join("image.tar");
    let mut tar = tar::Builder::new(fs::File::create(&path).unwrap());
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = header(tar::EntryType::Regular, bytes.len() as u64);
        tar.append_data(&mut header, name, bytes).unwrap();
    };
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    add("index.json", index.as_bytes());
    for (digest, bytes) in [&layer, &config, &manifest] {
        add(&format!("blobs/sha256/{digest}"), bytes);
    }
    tar.finish().unwrap();
    path
}

/// A containerd of the test's own, killed with the handle.
struct Containerd {
    dir: scratch::TempDir,
    daemon: Child,
}

impl Containerd {
    fn start() -> Self {
        let dir = scratch::on_disk().unwrap();
        let at = |name: &str| dir.path().join(name);
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("s"),
            at("t"),
        );
        fs::write(at("config.toml"), config).unwrap();
        let shims = Path::new(env!("CARGO_BIN_EXE_containerd-shim-rund-v2"))
            .parent()
            .unwrap();
        let path = format!("{}:{}", shims.display(), std::env::var("PATH").unwrap());
        let daemon = Command::new("containerd")
            .arg("-c")
            .arg(at("config.toml"))
            .env("PATH", path)
            .env("RUND_SHIM_TEMPLATES", at("templates"))
            .env_remove("RUND_SHIM_BACKEND")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(at("log")).unwrap())
            .spawn()
            .unwrap();
        let this = Self { dir, daemon };
        let start = Instant::now();
        while !this.ctr(&["version"]).status.success() {
            assert!(start.elapsed() < PATIENCE, "{}", this.log());
            thread::sleep(Duration::from_millis(50));
        }
        let image = image(this.dir.path());
        this.good(&["image", "import", image.to_str().unwrap()]);
        this
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .arg("60")
            .arg("ctr")
            .arg("-a")
            .arg(self.dir.path().join("s"));
        command.args(arguments).stdin(Stdio::null());
        command
    }

    fn ctr(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        log.lines().rev().take(15).collect::<Vec<_>>().join("\n")
    }

    #[track_caller]
    fn good(&self, arguments: &[&str]) -> String {
        let done = self.ctr(arguments);
        assert!(
            done.status.success(),
            "{arguments:?}: {done:?}\n{}",
            self.log()
        );
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// `ctr run` of a shell script by a backend, or by runc.
    fn run(&self, options: &[&str], backend: Option<&str>, id: &str, script: &str) -> Command {
        let annotation = format!("io.containerd.rund.backend={}", backend.unwrap_or_default());
        let mut arguments = vec!["run"];
        arguments.extend(options);
        if backend.is_some() {
            arguments.extend([
                "--runtime",
                "io.containerd.rund.v2",
                "--annotation",
                &annotation,
            ]);
        }
        arguments.extend([IMAGE, id, "/bin/sh", "-c", script]);
        self.command(&arguments)
    }

    fn in_force(&self, id: &str) -> Value {
        let tasks = self
            .dir
            .path()
            .join("state/io.containerd.runtime.v2.task/default");
        let text = fs::read_to_string(tasks.join(id).join("rund.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[track_caller]
    fn wait_for(&self, id: &str, status: &str) {
        let start = Instant::now();
        loop {
            let list = self.good(&["task", "ls"]);
            let line = list.lines().find(|line| line.starts_with(id));
            if line.is_some_and(|line| line.contains(status)) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{id} is not {status}: {list}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Shims end a while after their last container.
        for id in self.good(&["task", "ls", "-q"]).split_whitespace() {
            self.ctr(&["task", "rm", "-f", id]);
        }
        let _gone = self.daemon.kill();
        let _gone = self.daemon.wait();
    }
}

fn backends() -> Vec<&'static str> {
    let mut backends = vec!["process"];
    backends.extend(Capability::Kvm.is_present().then_some("kvm-elf"));
    backends
}

#[test]
fn ctr_runs_containers_as_with_runc() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    let cases = [
        ("echo out; echo err >&2; exit 5", ""),
        // Not its end: `ctr run` does not tell runc of that.
        ("read x; read y; echo $y $x", "some\ninput\n"),
        ("echo $A; false", ""),
        ("echo x > /new; cat /new; exit 0", ""),
        ("exit 200", ""),
    ];
    for (n, (script, input)) in cases.into_iter().enumerate() {
        let run = |backend: Option<&str>, id: String| {
            let options = ["--rm", "--env", "A=b"];
            let mut child = containerd
                .run(&options, backend, &id, script)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            child
                .stdin
                .take()
                .unwrap()
                .write_all(input.as_bytes())
                .unwrap();
            let done = child.wait_with_output().unwrap();
            (done.status.code(), done.stdout, done.stderr)
        };
        // A name of its own: runc remembers those of containers that were killed with their test.
        let expected = run(None, format!("runc-{}-{n}", std::process::id()));
        for backend in backends() {
            let got = run(Some(backend), format!("{backend}-{n}"));
            assert_eq!(got, expected, "{backend}: {script}: {}", containerd.log());
        }
    }
}

#[test]
fn a_container_is_stopped_resumed_entered_killed_and_deleted() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    for backend in backends() {
        let script = "echo began > /tmp/x; while :; do sleep 0.05; done";
        // The second container of a program begins from the first one's template.
        for (id, hit) in [("first", false), ("second", true)] {
            let id = &format!("{backend}-{id}");
            let done = containerd
                .run(&["-d"], Some(backend), id, script)
                .output()
                .unwrap();
            assert!(done.status.success(), "{done:?} {}", containerd.log());
            containerd.wait_for(id, "RUNNING");
            // The paper's four steps, joined.
            let in_force = containerd.in_force(id);
            assert_eq!(in_force["backend"], backend);
            assert_eq!(in_force["template_hit"], hit, "{id}");
            assert_eq!(in_force["split_rootfs"], true);
            assert_eq!(in_force["pooled_cgroup"], true);
            let isolation = in_force["isolation"].as_str().unwrap();
            assert_eq!(isolation == "process-only", backend == "process");

            let entered = containerd.ctr(&[
                "task",
                "exec",
                "--exec-id",
                "e",
                id,
                "/bin/sh",
                "-c",
                "echo entered; exit 3",
            ]);
            assert_eq!(
                entered.status.code(),
                Some(3),
                "{entered:?} {}",
                containerd.log()
            );
            assert_eq!(entered.stdout, b"entered\n");
            containerd.good(&["task", "pause", id]);
            containerd.wait_for(id, "PAUSED");
            containerd.good(&["task", "resume", id]);
            containerd.wait_for(id, "RUNNING");
            assert!(containerd.good(&["task", "metrics", id]).contains("memory"));
            assert!(containerd.good(&["task", "ps", id]).lines().count() >= 2);

            // A running one is not deleted; a killed one says by what.
            assert!(!containerd.ctr(&["task", "delete", id]).status.success());
            containerd.good(&["task", "kill", "-s", "SIGTERM", id]);
            containerd.wait_for(id, "STOPPED");
            let deleted = containerd.ctr(&["task", "delete", id]);
            let said = String::from_utf8_lossy(&deleted.stderr).into_owned();
            assert!(said.contains("143"), "{deleted:?}");
            containerd.good(&["container", "rm", id]);
        }
    }
    // What nobody does is refused, and the container's root is not left mounted.
    let other = containerd
        .run(&["--rm"], Some("none"), "other", "true")
        .output()
        .unwrap();
    assert!(!other.status.success());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let here = containerd.dir.path().to_str().unwrap();
    assert_eq!(
        mounts.lines().filter(|line| line.contains(here)).count(),
        0,
        "{mounts}"
    );
}
