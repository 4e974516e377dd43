//! What a clone is: itself, as its template was, and gone without a trace.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Role};
use rund_rt::{
    CloneSpec, Error, Limits, Output, Reuse, Runtime, SnapshotPoint, Status, Stdin, TemplateSpec,
};

use common::{
    BUSYBOX, PATIENCE, busybox, c_program, root, run, runtime, rust_program, shell, text,
};

fn echo(words: &str) -> CloneSpec {
    CloneSpec::new().args(["busybox", "echo", words])
}

#[test]
fn a_static_c_program_says_what_it_says_on_the_host() {
    carlsbad_kit::require!(Capability::Kvm);
    let dir = tempfile::tempdir().unwrap();
    let program = c_program(dir.path(), "plain").unwrap();
    let runtime = runtime();
    let args = ["plain", "one", "two words"];
    let template = runtime
        .prepare(&TemplateSpec::new(&program).args(args).env(["HOME=/home"]))
        .unwrap();
    use std::os::unix::process::CommandExt;
    let host = std::process::Command::new(&program)
        .arg0("plain")
        .args(&args[1..])
        .env_clear()
        .env("HOME", "/home")
        .output()
        .unwrap();
    let ours = run(&runtime, &template, CloneSpec::new());
    assert_eq!(text(&ours.stdout), text(&host.stdout));
    assert_eq!(text(&ours.stderr), text(&host.stderr));
    assert_eq!(ours.status, Status::Code(42));
}

/// Lines of `identity` by their first words.
fn identity(out: &[u8]) -> BTreeMap<String, String> {
    text(out)
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn entropy_clock_and_ids_differ_in_every_clone() {
    carlsbad_kit::require!(Capability::Kvm);
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    for musl in [true, false] {
        // Where the musl target is not installed, its half is left out.
        let Some(program) = rust_program(dir.path(), "identity", musl) else {
            assert!(musl, "rustc makes no static program");
            continue;
        };
        for point in [
            SnapshotPoint::Entry,
            SnapshotPoint::FirstIdentity,
            SnapshotPoint::FirstInput,
        ] {
            let template = runtime
                .prepare(&TemplateSpec::new(&program).snapshot(point))
                .unwrap();
            let mut seen: BTreeMap<String, HashSet<String>> = BTreeMap::new();
            const CLONES: usize = 8;
            for i in 0..CLONES {
                let input = Stdin::Bytes(format!("number {i}\n").into_bytes());
                let exit = run(&runtime, &template, CloneSpec::new().stdin(input));
                assert!(
                    exit.status.success(),
                    "{point:?}: {:?} {}",
                    exit.status,
                    text(&exit.stderr)
                );
                for (key, value) in identity(&exit.stdout) {
                    seen.entry(key).or_default().insert(value);
                }
            }
            for key in ["input", "entropy", "clock", "pid", "boot", "host", "hash"] {
                assert_eq!(seen[key].len(), CLONES, "{point:?} {key}: {:?}", seen[key]);
            }
            // The control: what the program computed before is the same in all.
            assert_eq!(seen["table"].len(), 1);
        }
    }
}

#[test]
fn two_hundred_alive_at_once_answer_again_after_the_last_has_started() {
    carlsbad_kit::require!(Capability::Kvm);
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("root/data")).unwrap();
    std::fs::create_dir(dir.path().join("root/tmp")).unwrap();
    std::fs::write(dir.path().join("root/data/motto"), "read from the root\n").unwrap();
    let program = c_program(dir.path(), "serve").unwrap();
    let runtime = runtime();
    let spec = TemplateSpec::new(&program)
        .root(dir.path().join("root"))
        .snapshot(SnapshotPoint::FirstInput);
    let template = runtime.prepare(&spec).unwrap();
    let sandboxes: Vec<_> = runtime
        .start_many(
            &template,
            (0..200).map(|_| CloneSpec::new().stdin(Stdin::Piped).stdout(Output::Piped)),
        )
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let mut ends: Vec<_> = sandboxes
        .iter()
        .map(|s| {
            (
                s.take_stdin().unwrap(),
                BufReader::new(s.take_stdout().unwrap()),
            )
        })
        .collect();
    let mut pids = HashSet::new();
    for round in 0..2 {
        for (i, (input, output)) in ends.iter_mut().enumerate() {
            let line = format!("round {round} of {i}\n");
            input.write_all(line.as_bytes()).unwrap();
            let mut answer = String::new();
            output.read_line(&mut answer).unwrap();
            let expected = format!("read from the root round {round} of {i} ");
            let pid = answer
                .strip_prefix(&expected)
                .unwrap_or_else(|| panic!("{answer}"));
            pids.insert(pid.trim().to_owned());
        }
    }
    assert_eq!(pids.len(), 200);
    drop(ends);
    for sandbox in &sandboxes {
        assert!(sandbox.wait(PATIENCE).unwrap().status.success());
    }
    let written = std::fs::read_dir(dir.path().join("root/tmp")).unwrap();
    assert_eq!(written.count(), 0, "what clones write is their own");
}

#[test]
fn a_machine_that_was_set_back_is_the_template() {
    carlsbad_kit::require!(Capability::Kvm);
    let dir = tempfile::tempdir().unwrap();
    let program = c_program(dir.path(), "hostile").unwrap();
    let runtime = runtime();
    let template = runtime.prepare(&TemplateSpec::new(&program)).unwrap();
    for what in ["dirty", "shim", "null", "cs", "memory", "ud2", "dirty"] {
        let spec = CloneSpec::new().args(["hostile", what]).verify_reset();
        let sandbox = runtime.start(&template, spec).unwrap();
        sandbox.wait(PATIENCE).unwrap();
        let differences = sandbox.reset_differences();
        let Some(differences) = differences else {
            // Before Linux 6.7 the pages that differ cannot be found: every clone is a fresh one.
            assert!(!sandbox.stats().unwrap().recycled);
            continue;
        };
        assert_eq!(differences, Vec::<String>::new(), "after {what}");
        let pages = sandbox.stats().unwrap().dirty_pages;
        // The control: there was something to set back.
        assert!(
            pages > 0 && (what != "dirty" || pages > 2048),
            "{what}: {pages} pages"
        );
    }
}

#[test]
fn reset_and_fresh_are_the_users_choice() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    for reuse in [Reuse::Reset, Reuse::Fresh] {
        let mut pids = HashSet::new();
        for i in 0..4 {
            let exit = run(&runtime, &template, echo(&i.to_string()).reuse(reuse));
            assert_eq!(text(&exit.stdout), format!("{i}\n"));
            assert!(reuse == Reuse::Reset || !exit.stats.recycled);
            pids.insert(exit.stats.pid);
        }
        if reuse == Reuse::Fresh {
            assert_eq!(pids.len(), 4);
        }
    }
}

#[test]
fn what_a_clone_writes_is_in_no_other() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    for _ in 0..3 {
        let script = "cat /tmp/mine /data/words | head -n 1; echo mine > /tmp/mine; rm /data/words";
        let exit = shell(&runtime, &template, script);
        assert_eq!(text(&exit.stdout), "pear\n");
        assert!(exit.stats.split_rootfs);
    }
    assert!(root.path().join("data/words").exists());
    assert!(!root.path().join("tmp/mine").exists());
}

#[test]
fn a_saved_template_is_cloned_by_another_runtime() {
    carlsbad_kit::require!(Capability::Kvm);
    let dir = tempfile::tempdir().unwrap();
    let program = c_program(dir.path(), "serve").unwrap();
    let path = dir.path().join("serve.template");
    let spec = TemplateSpec::new(&program).snapshot(SnapshotPoint::FirstInput);
    runtime().prepare(&spec).unwrap().save(&path).unwrap();
    std::fs::remove_file(&program).unwrap();
    let runtime = runtime();
    let root = root();
    let template = runtime.load(&path, Some(root.path())).unwrap();
    let exit = run(
        &runtime,
        &template,
        CloneSpec::new().stdin(Stdin::Bytes(b"x\n".to_vec())),
    );
    assert!(text(&exit.stdout).starts_with("none x "), "{exit:?}");

    // Cut short anywhere, or with one bit turned, it is refused.
    let whole = std::fs::read(&path).unwrap();
    let mut rng = carlsbad_kit::seed::rng("a_saved_template");
    for _ in 0..40 {
        let mut broken = whole.clone();
        if rng.bool() {
            broken.truncate(rng.usize(..whole.len()));
        } else {
            broken[rng.usize(..whole.len())] ^= 1 << rng.u32(..8);
        }
        std::fs::write(&path, &broken).unwrap();
        let refused = runtime.load(&path, None);
        assert!(
            matches!(refused, Err(Error::BadTemplate { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn a_sandbox_is_killed_while_another_thread_waits() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    for args in [["busybox", "sleep", "1000"], ["busybox", "yes", "no"]] {
        let spec = CloneSpec::new().args(args).stdout(Output::Null);
        let sandbox = runtime.start(&template, spec).unwrap();
        let kill = sandbox.kill_handle();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| sandbox.wait(PATIENCE).unwrap());
            let also = scope.spawn(|| sandbox.wait(PATIENCE).unwrap());
            let late = sandbox.wait(Some(Duration::from_millis(20)));
            assert!(
                matches!(late, Err(Error::DeadlineExceeded { .. })),
                "{late:?}"
            );
            kill.kill().unwrap();
            assert_eq!(waits.join().unwrap().status, Status::Signal(libc::SIGKILL));
            assert_eq!(also.join().unwrap().status, Status::Signal(libc::SIGKILL));
        });
        kill.kill().unwrap();
    }
    // A handle of one that has ended does not reach whoever has its process now.
    let first = runtime.start(&template, echo("first")).unwrap();
    let old = first.kill_handle();
    first.wait(PATIENCE).unwrap();
    drop(first);
    let script = ["busybox", "sh", "-c", "read x; echo $x"];
    let spec = CloneSpec::new().args(script).stdin(Stdin::Piped);
    let second = runtime.start(&template, spec).unwrap();
    old.kill().unwrap();
    writeln!(second.take_stdin().unwrap(), "second").unwrap();
    assert_eq!(text(&second.wait(PATIENCE).unwrap().stdout), "second\n");
}

#[test]
fn the_watchdog_ends_whatever_takes_too_long() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    for script in [
        "while :; do :; done",
        "sleep 1000",
        "read x",
        "cat | sleep 1000",
    ] {
        let mut limits = Limits::default();
        limits.run_time = Some(Duration::from_millis(100));
        let spec = CloneSpec::new()
            .args(["busybox", "sh", "-c", script])
            .limits(limits)
            .stdin(Stdin::Piped);
        let began = Instant::now();
        let sandbox = runtime.start(&template, spec).unwrap();
        let _open = sandbox.take_stdin();
        assert_eq!(
            sandbox.wait(PATIENCE).unwrap().status,
            Status::TimedOut,
            "{script}"
        );
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}

#[test]
fn output_beyond_the_limit_is_dropped_and_said_to_be() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let mut limits = Limits::default();
    limits.output = carlsbad_types::ByteSize::kib(100);
    let spec = CloneSpec::new()
        .args(["busybox", "seq", "100000"])
        .limits(limits);
    let exit = run(&runtime, &template, spec);
    assert!(exit.truncated && exit.status.success());
    assert_eq!(exit.stdout.len(), 100 << 10);
    let all = run(
        &runtime,
        &template,
        CloneSpec::new().args(["busybox", "seq", "100000"]),
    );
    assert_eq!((all.truncated, all.stdout.len()), (false, 588_895));
}

#[test]
fn two_sandboxes_of_one_name_are_not_alive_together() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let first = runtime.start(&template, echo("1").id("one")).unwrap();
    let second = runtime.start(&template, echo("2").id("one"));
    assert!(matches!(second, Err(Error::DuplicateId { .. })));
    first.wait(PATIENCE).unwrap();
    drop(first);
    runtime.start(&template, echo("3").id("one")).unwrap();
}

/// Descriptors of this process, processes named as ours, and directories for writable layers.
fn traces(of: u32) -> (usize, usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let layers = std::fs::read_dir("/dev/shm")
        .unwrap()
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with("rund-upper-")
        })
        .count();
    (descriptors, children(of), layers)
}

fn children(of: u32) -> usize {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok())
        .filter(|stat| {
            let after = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            let mut fields = after.split(' ');
            let state = fields.next();
            state != Some("Z") && fields.next() == Some(&of.to_string())
        })
        .count()
}

#[test]
#[ignore = "a role of `nothing_is_left_of_ten_thousand`"]
fn role_ten_thousand() {
    let Some((cycles, root)) = child::arguments::<(usize, std::path::PathBuf)>("role_ten_thousand")
    else {
        return;
    };
    let before = traces(std::process::id());
    {
        let runtime = runtime();
        let template = busybox(&runtime, &root);
        for i in 0..cycles {
            let reuse = if i % 10 == 0 {
                Reuse::Fresh
            } else {
                Reuse::Reset
            };
            let script = "echo x > /tmp/x; echo done";
            let args = ["busybox", "sh", "-c", script];
            let exit = run(
                &runtime,
                &template,
                CloneSpec::new().args(args).reuse(reuse),
            );
            assert_eq!(text(&exit.stdout), "done\n");
        }
    }
    let after = traces(std::process::id());
    assert_eq!((before.0, before.1), (after.0, after.1));
    child::tell("clean");
}

#[test]
fn nothing_is_left_of_ten_thousand() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let cycles = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        10_000
    } else {
        500
    };
    let root = root();
    let mut role = Role::test("role_ten_thousand")
        .start(&(cycles, root.path()))
        .unwrap();
    while role
        .hear("clean")
        .is_err_and(|why| why.kind() == std::io::ErrorKind::TimedOut)
    {}
    assert!(role.wait().unwrap().success());
}

#[test]
#[ignore = "a role of `a_killed_owner_leaves_nothing`"]
fn role_owner() {
    let Some(root) = child::arguments::<std::path::PathBuf>("role_owner") else {
        return;
    };
    let runtime = runtime();
    let template = busybox(&runtime, &root);
    let args = [
        "busybox",
        "sh",
        "-c",
        "echo x > /tmp/x; (sleep 1000) & sleep 1000",
    ];
    let sandboxes: Vec<_> = (0..4)
        .map(|_| {
            runtime
                .start(&template, CloneSpec::new().args(args))
                .unwrap()
        })
        .collect();
    let pids: Vec<_> = sandboxes.iter().filter_map(rund_rt::Sandbox::pid).collect();
    let began = Instant::now();
    let forked = || pids.iter().all(|pid| children(*pid) > 0);
    while !forked() && began.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    child::tell(serde_json::to_string(&pids).unwrap());
    child::wait_for_parent();
}

#[test]
fn a_killed_owner_leaves_nothing() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let root = root();
    let mut owner = Role::test("role_owner").start(&root.path()).unwrap();
    let pids: Vec<u32> = serde_json::from_str(&owner.hear_any().unwrap()).unwrap();
    assert_eq!(pids.len(), 4);
    let alive = |pid: &u32| std::path::Path::new(&format!("/proc/{pid}/fdinfo/0")).exists();
    let relatives: usize = pids.iter().map(|pid| children(*pid)).sum();
    assert!(relatives >= 4, "the control: {relatives} guests' children");
    owner.kill();
    let began = Instant::now();
    let left = || {
        pids.iter()
            .filter(|pid| alive(pid) || children(**pid) > 0)
            .count()
    };
    while left() > 0 && began.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(left(), 0);
    // Whoever comes next sweeps the writable layers.
    let _next = busybox(&runtime(), root.path());
    for entry in std::fs::read_dir("/dev/shm").unwrap().flatten() {
        for pid in &pids {
            assert!(
                !entry.path().join(pid.to_string()).exists(),
                "{:?}",
                entry.path()
            );
        }
    }
}

#[test]
fn a_runtime_without_init_or_a_helper_says_so() {
    let refused = Runtime::builder().build();
    assert!(matches!(refused, Err(Error::NotInitialised)), "{refused:?}");
    let _ = BUSYBOX;
}
