//! A real containerd runs containers through the shim, and hears of them what it would hear of
//! runc.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs;
use std::io::{Read, Write};
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
    for name in ["bin", "usr", "proc", "dev", "tmp"] {
        let mut header = header(tar::EntryType::Directory, 0);
        tar.append_data(&mut header, name, &[][..]).unwrap();
    }
    let program = fs::read(BUSYBOX).unwrap();
    // One program at two places.
    for name in ["bin/busybox", "usr/busybox"] {
        let mut file = header(tar::EntryType::Regular, program.len() as u64);
        tar.append_data(&mut file, name, &program[..]).unwrap();
    }
    // What is found, and cannot be started.
    let mut file = header(tar::EntryType::Regular, 64);
    tar.append_data(&mut file, "bin/broken", &program[..64])
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

    /// Shims of this containerd that are there.
    fn shims(&self) -> usize {
        let ours = self.dir.path().as_os_str().as_encoded_bytes();
        let is_ours = |entry: &fs::DirEntry| {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let has = |part: &[u8]| line.windows(part.len()).any(|window| window == part);
            has(b"containerd-shim-rund-v2") && has(ours)
        };
        let all = fs::read_dir("/proc").unwrap().flatten();
        all.filter(is_ours).count()
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
        self.run_program(options, backend, id, &["/bin/sh", "-c", script])
    }

    fn run_program(
        &self,
        options: &[&str],
        backend: Option<&str>,
        id: &str,
        program: &[&str],
    ) -> Command {
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
        arguments.extend([IMAGE, id]);
        arguments.extend(program);
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

    /// The process that `ctr` says a container is.
    #[track_caller]
    fn pid(&self, id: &str) -> u32 {
        let list = self.good(&["task", "ls"]);
        let line = list.lines().find(|line| line.starts_with(id)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Ends a container and removes it.
    #[track_caller]
    fn end(&self, id: &str) {
        self.good(&["task", "kill", "-s", "SIGKILL", id]);
        self.wait_for(id, "STOPPED");
        self.ctr(&["task", "delete", id]);
        self.good(&["container", "rm", id]);
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

/// A process and all that it has started.
fn family(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(path).unwrap_or_default();
    let below = children
        .split_whitespace()
        .flat_map(|child| family(child.parse().unwrap()));
    std::iter::once(pid).chain(below).collect()
}

/// The control group of a process by one of its controllers, below the mounts.
fn group(pid: u32, controller: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let lines = text.lines().map(|line| line.splitn(3, ':').skip(1));
    let mut groups = lines.map(|mut line| (line.next().unwrap(), line.next().unwrap()));
    let of = |name: &str| name.split(',').any(|one| one == controller);
    let group = groups.clone().find(|(name, _)| of(name));
    let group = group.or_else(|| groups.find(|(name, _)| name.is_empty()));
    group.unwrap().1.to_owned()
}

#[test]
fn limits_are_met_and_hold_for_all_that_a_container_starts() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    for backend in backends() {
        // A block of that size is memory of the program's.
        let script = "/bin/busybox dd if=/dev/zero of=/dev/null bs=40M count=1 2>/dev/null";
        for (id, memory, code) in [("enough", "134217728", 0), ("little", "25165824", 137)] {
            let id = &format!("{backend}-{id}");
            let options = [
                "--rm",
                "--memory-limit",
                memory,
                "--cpu-quota",
                "50000",
                "--cpu-period",
                "100000",
            ];
            let done = containerd.run(&options, Some(backend), id, script).output();
            let done = done.unwrap();
            assert_eq!(
                done.status.code(),
                Some(code),
                "{id}: {done:?} {}",
                containerd.log()
            );

            // What is started in it later has its limits too.
            let options = ["-d", "--memory-limit", memory];
            let mut command = containerd.run(&options, Some(backend), id, "/bin/sleep 100");
            command.output().unwrap();
            let enter = [
                "task",
                "exec",
                "--exec-id",
                "e",
                id,
                "/bin/sh",
                "-c",
                script,
            ];
            let done = containerd.ctr(&enter);
            assert_eq!(done.status.code(), Some(code), "{id}: {done:?}");
            containerd.end(id);
        }

        // It forks at once, and so does what it has forked.
        let id = &format!("{backend}-forks");
        let pair = "(/bin/sleep 100 & /bin/sleep 100 & wait)";
        let script = &format!("{pair} & {pair} & wait");
        let options = ["-d", "--memory-limit", "67108864"];
        let began = Instant::now();
        containerd
            .run(&options, Some(backend), id, script)
            .output()
            .unwrap();
        let pid = containerd.pid(id);
        let start = Instant::now();
        let family = loop {
            let family = family(pid);
            if family.len() >= 7 {
                break family;
            }
            assert!(start.elapsed() < PATIENCE, "{id}: {family:?}");
            thread::sleep(Duration::from_millis(20));
        };
        for controller in ["memory", "pids", "cpu", "freezer"] {
            let expected = group(pid, controller);
            assert!(expected.contains("/rund-rt/shim."), "{id}: {expected}");
            for &member in &family {
                assert_eq!(group(member, controller), expected, "{id}: {controller}");
            }
        }
        let text = containerd.good(&["task", "metrics", id]);
        let metric = |name: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        assert_eq!(metric("memory.limit_in_bytes"), 67_108_864, "{id}: {text}");
        assert!(metric("memory.usage_in_bytes") > 0, "{id}: {text}");
        assert!(metric("pids.current") >= 7, "{id}: {text}");
        // More than a microsecond, less than all processors since the beginning.
        let used = Duration::from_nanos(metric("cpuacct.usage "));
        let most = began.elapsed() * thread::available_parallelism().unwrap().get() as u32;
        assert!(
            used > Duration::from_micros(1) && used < most,
            "{id}: {text}"
        );
        containerd.end(id);
    }
}

#[test]
fn what_is_asked_for_and_not_done_is_refused() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    let tmpfs = "type=tmpfs,src=tmpfs,dst=/data,options=size=4k";
    let cases: [(&[&str], &str); 6] = [
        (&["--mount", tmpfs], "a tmpfs mount at /data"),
        (&["--device", "/dev/null"], "the device /dev/null"),
        (&["--privileged"], "the device"),
        (
            &["--cap-add", "CAP_SYS_ADMIN"],
            "the capability CAP_SYS_ADMIN",
        ),
        (&["--cpu-shares", "512"], "512 shares"),
        (&["--seccomp"], "linux.seccomp"),
    ];
    for backend in backends() {
        for (n, (options, why)) in cases.into_iter().enumerate() {
            let options = [&["--rm"], options].concat();
            let id = format!("{backend}-{n}");
            let mut command = containerd.run(&options, Some(backend), &id, "echo ran");
            let done = command.output().unwrap();
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(!done.status.success(), "{options:?}: {done:?}");
            assert!(done.stdout.is_empty(), "{options:?}: {done:?}");
            assert!(said.contains(why), "{options:?}: {said}");
        }
    }
}

#[test]
fn a_read_only_root_is_one() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    let script = "echo x > /usr/f; echo $?; rm /bin/busybox; echo $?; cat /usr/f";
    let run = |backend: Option<&str>, id: &str| {
        let mut command = containerd.run(&["--rm", "--read-only"], backend, id, script);
        let done = command.output().unwrap();
        (done.status.code(), done.stdout, done.stderr)
    };
    let expected = run(None, &format!("runc-ro-{}", std::process::id()));
    assert!(
        String::from_utf8_lossy(&expected.2).contains("Read-only file system"),
        "{expected:?}"
    );
    let mut backends = vec!["process"];
    if Capability::Kvm.is_present() {
        backends.push("kvm-elf");
    }
    for backend in backends {
        let done = run(Some(backend), &format!("{backend}-ro"));
        assert_eq!(done, expected, "{}", containerd.log());
    }
}

#[test]
fn a_paused_container_is_not_entered_and_only_signals_are_sent() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    for backend in backends() {
        let script = "while :; do /bin/sleep 0.05; done";
        let done = containerd
            .run(&["-d"], Some(backend), backend, script)
            .output();
        let done = done.unwrap();
        assert!(done.status.success(), "{done:?} {}", containerd.log());
        let enter = |name: &str| {
            let enter = ["task", "exec", "--exec-id", name, backend];
            containerd.ctr(&[&enter[..], &["/bin/echo", "entered"]].concat())
        };
        containerd.good(&["task", "pause", backend]);
        let entered = enter("e1");
        assert!(!entered.status.success(), "{entered:?}");
        assert!(entered.stdout.is_empty(), "{entered:?}");
        let said = String::from_utf8_lossy(&entered.stderr).into_owned();
        assert!(said.contains("paused"), "{said}");
        containerd.good(&["task", "resume", backend]);
        assert_eq!(enter("e2").stdout, b"entered\n");

        for number in ["65", "99", "4294967295"] {
            let killed = containerd.ctr(&["task", "kill", "-s", number, backend]);
            assert!(!killed.status.success(), "{number}: {killed:?}");
        }
        // A terminal that changes its size ends nobody.
        containerd.good(&["task", "kill", "-s", "SIGWINCH", backend]);
        thread::sleep(Duration::from_millis(200));
        containerd.wait_for(backend, "RUNNING");
        containerd.end(backend);
    }
}

#[test]
fn a_program_finds_itself_where_its_own_container_has_it() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd,
        Capability::Kvm
    );
    let containerd = Containerd::start();
    // The same bytes at two places; the third time from a template.
    for (n, program) in ["/bin/busybox", "/usr/busybox", "/bin/busybox"]
        .into_iter()
        .enumerate()
    {
        for backend in [None, Some("kvm-elf")] {
            let name = backend.unwrap_or("runc");
            let id = format!("{name}-{n}-{}", std::process::id());
            let asks = [program, "readlink", "/proc/self/exe"];
            let mut command = containerd.run_program(&["--rm"], backend, &id, &asks);
            let done = command.output().unwrap();
            let said = String::from_utf8_lossy(&done.stdout);
            assert_eq!(said.trim_end(), program, "{id}: {done:?}");
        }
    }
}

#[test]
fn a_detached_container_goes_on_though_nobody_reads_it_and_takes_all_with_it_at_its_end() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    for backend in backends() {
        let script = "while :; do echo x; /bin/sleep 0.05; done";
        // The reader of its output ends with this.
        containerd
            .run(&["-d"], Some(backend), backend, script)
            .output()
            .unwrap();
        let mut entered = containerd
            .command(&["task", "exec", "--exec-id", "e", backend])
            .args(["/bin/sh", "-c", "echo entered; /bin/sleep 100"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 8];
        let mut output = entered.stdout.take().unwrap();
        output.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"entered\n");
        thread::sleep(Duration::from_millis(500));
        containerd.wait_for(backend, "RUNNING");

        containerd.good(&["task", "kill", "-s", "SIGTERM", backend]);
        containerd.wait_for(backend, "STOPPED");
        assert_eq!(entered.wait().unwrap().code(), Some(137), "{backend}");
        containerd.ctr(&["task", "delete", backend]);
        containerd.good(&["container", "rm", backend]);
    }
}

#[test]
fn a_pause_stops_all_that_a_container_has_started() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    for backend in backends() {
        let script = "t() { while :; do echo $1; /bin/sleep 0.05; done; }; t a & (t b & t c)";
        let path = containerd.dir.path().join(format!("{backend}.out"));
        let mut ctr = containerd
            .run(&[], Some(backend), backend, script)
            .stdout(fs::File::create(&path).unwrap())
            .spawn()
            .unwrap();
        let written = || fs::read_to_string(&path).unwrap();
        let start = Instant::now();
        let wait_for = |done: &dyn Fn(&str) -> bool| {
            while !done(&written()) {
                assert!(
                    start.elapsed() < PATIENCE,
                    "{backend}: {}",
                    containerd.log()
                );
                thread::sleep(Duration::from_millis(20));
            }
        };
        wait_for(&|text| ["a\n", "b\n", "c\n"].iter().all(|line| text.contains(line)));
        containerd.good(&["task", "pause", backend]);
        // What was written before is carried to the end.
        thread::sleep(Duration::from_millis(500));
        let before = written().len();
        thread::sleep(Duration::from_secs(1));
        assert_eq!(written().len(), before, "{backend}");
        containerd.good(&["task", "resume", backend]);
        for line in ["a\n", "b\n", "c\n"] {
            wait_for(&|text| text[before..].contains(line));
        }
        // `ctr` deletes the task when it has ended.
        containerd.good(&["task", "kill", "-s", "SIGKILL", backend]);
        assert_eq!(ctr.wait().unwrap().code(), Some(137), "{backend}");
        containerd.good(&["container", "rm", backend]);
    }
}

#[test]
fn a_container_that_cannot_start_is_gone_afterwards() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::ControlGroups,
        Capability::Containerd
    );
    let containerd = Containerd::start();
    let mut backends = vec!["process"];
    if Capability::Kvm.is_present() {
        backends.push("kvm-elf");
    }
    for backend in backends {
        let id = format!("{backend}-broken");
        let mut command = containerd.run_program(&["--rm"], Some(backend), &id, &["/bin/broken"]);
        let done = command.output().unwrap();
        assert!(!done.status.success(), "{done:?}");
        let tasks = containerd.good(&["task", "ls"]);
        assert!(!tasks.contains(&id), "{tasks}\n{}", containerd.log());
    }
    // Nor does the shim wait for it: with nothing left it ends, some twenty seconds later.
    if std::env::var_os("CARLSBAD_SOAK").is_some() {
        let began = Instant::now();
        while containerd.shims() > 0 {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "{}",
                containerd.log()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
