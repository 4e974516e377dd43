//! The backend `process`: programs confined by namespaces and filters, and labelled as such.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Role};
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use rund_rt::cgroup::{CgroupPool, Hierarchy, PoolConfig};
use rund_rt::rootfs::{RootfsConfig, RootfsStore, Upper};
use rund_rt::{
    Backend, CloneSpec, Error, Exit, Instance, Isolation, Limits, Output, ProcessBackend, Status,
    Stdin, Template, TemplateSpec,
};

// The test harness' `main` is not ours: helpers are recognised before it.
#[used]
#[unsafe(link_section = ".init_array")]
static INIT: extern "C" fn() = {
    extern "C" fn init() {
        rund_rt::init();
    }
    init
};

const PATIENCE: Option<Duration> = Some(Duration::from_secs(60));
const BUSYBOX: &str = "/bin/busybox";

/// A root with busybox in it, or nothing where that is not installed.
fn root() -> Option<(scratch::TempDir, PathBuf)> {
    let dir = scratch::on_disk().unwrap();
    let root = dir.path().join("root");
    for name in ["bin", "proc", "dev", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    if fs::copy(BUSYBOX, root.join("bin/busybox")).is_err() {
        return None;
    }
    Some((dir, root))
}

fn can_run() -> bool {
    Capability::Root.is_present() || Capability::Namespaces.is_present()
}

fn template(backend: &ProcessBackend, root: Option<&Path>) -> Template {
    let mut spec = TemplateSpec::new(BUSYBOX);
    spec.root = root.map(Path::to_owned);
    spec.env = vec!["PATH=/bin".into(), "A=b".into()];
    backend.build_template(&spec).unwrap()
}

fn shell(script: &str) -> CloneSpec {
    CloneSpec::new().args(["busybox", "sh", "-c", script])
}

fn run(backend: &ProcessBackend, template: &Template, spec: CloneSpec) -> Exit {
    let instance = backend.clone_from(template, spec).unwrap();
    instance.wait(PATIENCE).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

macro_rules! require_sandboxes {
    ($dir:ident, $root:ident) => {
        if !can_run() {
            carlsbad_kit::require!(Capability::Namespaces);
        }
        let Some(($dir, $root)) = root() else { return };
    };
}

#[test]
fn a_program_runs_with_its_arguments_environment_input_and_output() {
    require_sandboxes!(_dir, root);
    let backend = ProcessBackend::new();
    let template = template(&backend, Some(&root));
    let script = "read x; echo out $x $A; echo err >&2; pwd; exit 7";
    let exit = run(
        &backend,
        &template,
        shell(script).stdin(Stdin::Bytes(b"hello\n".to_vec())),
    );
    assert_eq!(exit.status, Status::Code(7), "{}", text(&exit.stderr));
    assert_eq!(text(&exit.stdout), "out hello b\n/\n");
    assert_eq!(text(&exit.stderr), "err\n");
    assert_eq!(exit.stats.isolation, Some(Isolation::ProcessOnly));
    assert!(!Isolation::ProcessOnly.is_vm());
    assert_eq!(exit.stats.backend, "process");
    // Again the same answer, and from its own death by signal.
    let exit = run(&backend, &template, shell("kill -9 $$"));
    assert_eq!(exit.status, Status::Signal(9));
    let exit = run(&backend, &template, shell("kill -SEGV $$"));
    assert_eq!(exit.status, Status::Signal(11));
}

#[test]
fn a_sandbox_sees_itself_alone() {
    require_sandboxes!(_dir, root);
    let backend = ProcessBackend::new();
    let template = template(&backend, Some(&root));
    let say = |script: &str| text(&run(&backend, &template, shell(script)).stdout);
    let processes = say("cd /proc; echo [0-9]*");
    assert!(processes.split_whitespace().count() <= 4, "{processes}");
    assert_eq!(say("ls /"), "bin\ndev\nproc\ntmp\n");
    assert_eq!(say("ls /sys/class/net /home 2>/dev/null"), "");
    let first = run(&backend, &template, shell("hostname").id_of("one"));
    assert_eq!(text(&first.stdout), "one\n");
    // What the host's root may do, and a sandbox may not, although it is root in it.
    for forbidden in [
        "mount -t tmpfs x /tmp",
        "unshare -m true",
        "chroot / true",
        "mknod /tmp/disk b 8 0",
        "hostname other",
        "! date -s 2000-01-01 2>&1 | grep -q \"can't set\"",
        "echo 1 > /proc/sys/kernel/panic",
        "echo c > /proc/sysrq-trigger",
        "kill -9 1; test ! -d /proc/1",
        "cat /proc/1/environ > /dev/null",
        "wget http://127.0.0.1:1/ -T 1",
        "touch /new",
    ] {
        let exit = run(&backend, &template, shell(forbidden));
        assert!(!exit.status.success(), "{forbidden}: {exit:?}");
    }
    assert!(!root.join("new").exists());
    // The control: what it may do.
    for allowed in [
        "true",
        "cat /proc/self/status",
        "head -c 8 /dev/urandom",
        "echo x > /dev/null",
    ] {
        let exit = run(&backend, &template, shell(allowed));
        assert!(exit.status.success(), "{allowed}: {}", text(&exit.stderr));
    }
    let status = say("cat /proc/self/status");
    for line in [
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }
}

/// A name of a clone, short.
trait IdOf {
    fn id_of(self, id: &str) -> Self;
}

impl IdOf for CloneSpec {
    fn id_of(self, id: &str) -> Self {
        self.id(id)
    }
}

#[test]
fn nothing_is_visible_without_a_root() {
    require_sandboxes!(_dir, _root);
    let backend = ProcessBackend::new();
    let template = template(&backend, None);
    let exit = run(&backend, &template, shell("echo /*; echo x > /x && cat /x"));
    assert_eq!(
        text(&exit.stdout),
        "/dev /proc /tmp\nx\n",
        "{}",
        text(&exit.stderr)
    );
}

#[test]
fn time_that_is_over_a_kill_and_too_much_output() {
    require_sandboxes!(_dir, root);
    let backend = ProcessBackend::new();
    let template = template(&backend, Some(&root));
    let mut limits = Limits::default();
    limits.run_time = Some(Duration::from_millis(100));
    let loops = "sh -c 'while :; do :; done' & while :; do :; done";
    let exit = run(&backend, &template, shell(loops).limits(limits));
    assert_eq!(exit.status, Status::TimedOut);

    let instance = backend
        .clone_from(&template, shell("echo here; sleep 1000"))
        .unwrap();
    let waited = instance.wait(Some(Duration::from_millis(10)));
    assert!(matches!(waited, Err(Error::DeadlineExceeded { .. })));
    let kill = instance.kill_handle();
    thread::scope(|scope| {
        let waits = scope.spawn(|| instance.wait(PATIENCE).unwrap());
        thread::sleep(Duration::from_millis(50));
        kill.kill().unwrap();
        let exit = waits.join().unwrap();
        assert_eq!(exit.status, Status::Signal(9));
        assert_eq!(text(&exit.stdout), "here\n");
    });
    kill.kill().unwrap();
    assert_eq!(instance.wait(None).unwrap().status, Status::Signal(9));

    let mut limits = Limits::default();
    limits.output = ByteSize::kib(100);
    let exit = run(
        &backend,
        &template,
        shell("yes; true").limits({
            limits.run_time = Some(Duration::from_millis(200));
            limits
        }),
    );
    assert_eq!((exit.stdout.len(), exit.truncated), (100 << 10, true));
}

#[test]
fn a_paused_sandbox_stands_still_and_pipes_are_live() {
    require_sandboxes!(_dir, root);
    let pool =
        (Capability::Root.is_present() && Capability::ControlGroups.is_present()).then(|| {
            let mut config = PoolConfig::default();
            config.name = "pause".to_owned();
            config.ready = 2;
            Arc::new(CgroupPool::new(Hierarchy::detect().unwrap(), config).unwrap())
        });
    let backends = [
        Some(ProcessBackend::new()),
        pool.map(|pool| ProcessBackend::new().cgroups(pool)),
    ];
    for backend in backends.into_iter().flatten() {
        let template = template(&backend, Some(&root));
        let spec = shell("while read x; do echo $x; done")
            .stdin(Stdin::Piped)
            .stdout(Output::Piped);
        let instance = backend.clone_from(&template, spec).unwrap();
        let (mut input, mut output) = (
            instance.take_stdin().unwrap(),
            instance.take_stdout().unwrap(),
        );
        assert!(instance.take_stdin().is_none());
        let mut echo = |text: &str| {
            input.write_all(text.as_bytes()).unwrap();
            let mut back = vec![0; text.len()];
            output.read_exact(&mut back).unwrap();
            String::from_utf8(back).unwrap()
        };
        assert_eq!(echo("one\n"), "one\n");
        instance.pause().unwrap();
        thread::scope(|scope| {
            let waits = scope.spawn(|| echo("two\n"));
            thread::sleep(Duration::from_millis(100));
            assert!(!waits.is_finished());
            instance.resume().unwrap();
            assert_eq!(waits.join().unwrap(), "two\n");
        });
        drop(input);
        assert!(instance.wait(PATIENCE).unwrap().status.success());
    }
}

#[test]
fn programs_that_cannot_be_run_are_refused() {
    require_sandboxes!(dir, root);
    let backend = ProcessBackend::new();
    let build = |bytes: &[u8]| {
        let path = dir.path().join("program");
        fs::write(&path, bytes).unwrap();
        backend.build_template(&TemplateSpec::new(path))
    };
    for bytes in [&b""[..], b"\x7fEL", b"#!/bin/sh\n"] {
        assert!(matches!(build(bytes), Err(Error::BadProgram { .. })));
    }
    // Truncated: the kernel refuses, and the error says so.
    let template = build(&fs::read(BUSYBOX).unwrap()[..200]).unwrap();
    let refused = backend.clone_from(&template, CloneSpec::new()).unwrap_err();
    assert!(matches!(refused, Error::Refused(_)), "{refused}");
    // No such directory; a zero byte; limits that nobody enforces.
    let template = self::template(&backend, Some(&root));
    let mut spec = shell("true");
    spec.cwd = Some("/nowhere".into());
    assert!(matches!(
        backend.clone_from(&template, spec),
        Err(Error::Refused(_))
    ));
    let spec = CloneSpec::new().args(["a\0b"]);
    assert!(matches!(
        backend.clone_from(&template, spec),
        Err(Error::Refused(_))
    ));
    let mut limits = Limits::default();
    limits.memory = Some(ByteSize::mib(8));
    let refused = backend.clone_from(&template, shell("true").limits(limits));
    assert!(matches!(refused, Err(Error::NoController { .. })));
    assert!(backend.load_template(&root, None).is_err());
    assert!(template.save(&root.join("x")).is_err());
}

#[test]
fn clones_have_split_roots_and_groups_of_their_own() {
    carlsbad_kit::require!(
        Capability::Root,
        Capability::TmpfsMount,
        Capability::ControlGroups
    );
    require_sandboxes!(dir, root);
    let mut config = RootfsConfig::default();
    config.run_dir = dir.path().join("run");
    config.upper = Upper::Own {
        size: ByteSize::mib(1),
    };
    let store = RootfsStore::open(&config).unwrap();
    let mut config = PoolConfig::default();
    config.name = "clones".to_owned();
    config.ready = 16;
    let pool = Arc::new(CgroupPool::new(Hierarchy::detect().unwrap(), config).unwrap());
    let backend = ProcessBackend::new()
        .rootfs(store)
        .cgroups(Arc::clone(&pool));
    let template = template(&backend, Some(&root));
    let clones = 40;
    let script = "read x; test ! -e /mine && echo $x > /mine && cat /mine; read y; true";
    let instances: Vec<_> = (0..clones)
        .map(|n| {
            let spec = shell(script)
                .stdin(Stdin::Piped)
                .stdout(Output::Piped)
                .id(format!("c{n}"));
            backend.clone_from(&template, spec).unwrap()
        })
        .collect();
    // All are alive; each answers after the last has started.
    for (n, instance) in instances.iter().enumerate() {
        let (mut input, mut output) = (
            instance.take_stdin().unwrap(),
            instance.take_stdout().unwrap(),
        );
        writeln!(input, "{n}").unwrap();
        let mut answer = vec![0; n.to_string().len()];
        output.read_exact(&mut answer).unwrap();
        assert_eq!(text(&answer), n.to_string());
        let stats = instance.stats().unwrap();
        assert!(stats.split_rootfs && stats.pooled_cgroup && stats.pss.unwrap().get() > 0);
    }
    let again = backend.clone_from(&template, shell("true").id("c0"));
    assert!(matches!(again, Err(Error::DuplicateId { .. })));
    for instance in &instances {
        assert!(instance.wait(PATIENCE).unwrap().status.success());
    }
    assert!(!root.join("mine").exists());
    // One sandbox's OOM, and one's full disk, spare the others.
    let mut limits = Limits::default();
    limits.memory = Some(ByteSize::mib(24));
    limits.upper = ByteSize::mib(1);
    let spec = |script| shell(script).limits(limits.clone()).stdin(Stdin::Piped);
    let neighbour = backend
        .clone_from(&template, spec("read x; echo well > /x; cat /x"))
        .unwrap();
    let eater = run(&backend, &template, spec("tail /dev/zero"));
    assert_eq!(eater.status, Status::Signal(9));
    let full = run(
        &backend,
        &template,
        spec("dd if=/dev/zero of=/fill bs=1M count=2"),
    );
    assert!(text(&full.stderr).contains("No space left"), "{full:?}");
    drop(neighbour.take_stdin());
    assert_eq!(text(&neighbour.wait(PATIENCE).unwrap().stdout), "well\n");
    assert_eq!(pool.stats().leased, 0);
}

#[test]
#[ignore = "a role of `sandboxes_end_with_their_owner`"]
fn role_owner() {
    let Some(root) = child::arguments::<PathBuf>("role_owner") else {
        return;
    };
    let backend = ProcessBackend::new();
    let template = template(&backend, Some(&root));
    let spec = shell("sleep 1000 & sleep 1000")
        .stdout(Output::Null)
        .stderr(Output::Null);
    let instance = backend.clone_from(&template, spec).unwrap();
    child::tell(format!("pid {}", instance.pid().unwrap()));
    child::wait_for_parent();
}

#[test]
fn sandboxes_end_with_their_owner() {
    require_sandboxes!(_dir, root);
    let mut owner = Role::test("role_owner").start(&root).unwrap();
    let pid = owner.hear("pid").unwrap();
    let helper = PathBuf::from(format!("/proc/{pid}/comm"));
    assert!(helper.exists());
    owner.kill();
    let start = Instant::now();
    while helper.exists() {
        assert!(start.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_dropped_sandbox_is_killed_and_cycles_leave_no_process() {
    require_sandboxes!(_dir, root);
    let backend = ProcessBackend::new();
    let template = template(&backend, Some(&root));
    let cycles = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        10_000
    } else {
        30
    };
    let mut pids = Vec::new();
    for n in 0..cycles {
        let instance: Box<dyn Instance> =
            backend.clone_from(&template, shell("sleep 1000")).unwrap();
        if n < 30 {
            pids.push(instance.pid().unwrap());
        }
    }
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}/root")).exists());
    }
}
