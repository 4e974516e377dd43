//! What a sandbox may use is its own affair: who takes too much is stopped, and nobody else is.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::time::Duration;

use carlsbad_kit::capability::Capability;
use carlsbad_types::ByteSize;
use rund_rt::cgroup::{CgroupPool, Controller, Hierarchy, PoolConfig};
use rund_rt::{
    CloneSpec, Error, Exit, Limits, Output, Reuse, Runtime, SnapshotPoint, Status, Stdin,
    TemplateSpec,
};

use common::{BUSYBOX, PATIENCE, busybox, c_program, is_slow, root, runtime, shell, text};

/// A runtime whose sandboxes have control groups; none where memory cannot be limited here.
fn limited(name: &str) -> Option<Runtime> {
    let hierarchy = Hierarchy::detect().unwrap();
    if !hierarchy.has(Controller::Memory) {
        // Past the capture of the test harness: a skip that nobody sees is a lie.
        let _nobody_listens = std::io::Write::write_all(
            &mut std::io::stderr(),
            b"SKIPPED memory controller: mount or delegate it\n",
        );
        return None;
    }
    let mut config = PoolConfig::default();
    config.name = name.to_owned();
    config.ready = 2;
    config.capacity = 8;
    let pool = Arc::new(CgroupPool::new(hierarchy, config).unwrap());
    let runtime = Runtime::builder()
        .helper(env!("CARGO_BIN_EXE_rund"))
        .cgroups(pool)
        .require_vm()
        .build();
    Some(runtime.unwrap())
}

fn memory(mib: u64) -> Limits {
    let mut limits = Limits::default();
    limits.memory = Some(ByteSize::mib(mib));
    limits
}

#[test]
fn one_sandboxes_oom_spares_its_neighbours() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Root, Capability::ControlGroups);
    let Some(runtime) = limited("oom") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let program = c_program(dir.path(), "hungry").unwrap();
    let mut spec = TemplateSpec::new(&program).snapshot(SnapshotPoint::FirstInput);
    spec.memory = ByteSize::mib(512);
    let template = runtime.prepare(&spec).unwrap();
    let start = |limits| {
        let spec = CloneSpec::new().stdin(Stdin::Piped).stdout(Output::Piped);
        runtime.start(&template, spec.limits(limits)).unwrap()
    };
    let neighbours: Vec<_> = (0..3).map(|_| start(memory(48))).collect();
    let mut ends: Vec<_> = neighbours
        .iter()
        .map(|s| {
            (
                s.take_stdin().unwrap(),
                BufReader::new(s.take_stdout().unwrap()),
            )
        })
        .collect();
    let mut ask = |mib: u32| -> Vec<String> {
        let answer = |(input, output): &mut (std::fs::File, BufReader<std::fs::File>)| {
            input.write_all(format!("{mib}\n").as_bytes()).unwrap();
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            line
        };
        ends.iter_mut().map(answer).collect()
    };
    assert_eq!(ask(4), ["touched 4 MiB\n"; 3]);

    let glutton = start(memory(48));
    let mut input = glutton.take_stdin().unwrap();
    input.write_all(b"200\n").unwrap();
    let exit = glutton.wait(PATIENCE).unwrap();
    assert_eq!(exit.status, Status::Signal(SIGKILL), "{exit:?}");
    assert!(exit.stats.pooled_cgroup);
    let kills = exit.stats.usage.unwrap().oom_kills;
    assert!(kills.is_none_or(|kills| kills > 0), "{exit:?}");

    // Those beside it go on, and can have what is theirs.
    assert_eq!(ask(8), ["touched 8 MiB\n"; 3]);
    // The control: with room the same program has its 200 MiB.
    let roomy = start(memory(400));
    let mut input = roomy.take_stdin().unwrap();
    let mut output = BufReader::new(roomy.take_stdout().unwrap());
    input.write_all(b"200\n").unwrap();
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "touched 200 MiB\n");
    drop((input, ends));
    assert!(roomy.wait(PATIENCE).unwrap().status.success());
    for neighbour in &neighbours {
        let exit = neighbour.wait(PATIENCE).unwrap();
        assert!(exit.status.success(), "{exit:?}");
        assert!(exit.stats.pooled_cgroup);
    }
}

/// The signal of the kernel's out-of-memory killer.
const SIGKILL: i32 = 9;

#[test]
fn a_limit_without_a_pool_is_refused() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let template = runtime.prepare(&TemplateSpec::new(BUSYBOX)).unwrap();
    let refused = runtime.start(&template, CloneSpec::new().limits(memory(48)));
    assert!(matches!(refused, Err(Error::NoController { .. })));
}

#[test]
fn a_full_writable_layer_is_the_guests_affair() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let mut limits = Limits::default();
    limits.upper = ByteSize::kib(256);
    for reuse in [Reuse::Reset, Reuse::Fresh] {
        let script = "head -c 100000 /dev/zero > /tmp/a; echo $?; \
                      head -c 1000000 /dev/zero > /tmp/b 2> /dev/null; echo $?; \
                      rm /tmp/b; echo again > /tmp/c; cat /tmp/c";
        let args = ["busybox", "sh", "-c", script];
        let spec = CloneSpec::new()
            .args(args)
            .limits(limits.clone())
            .reuse(reuse);
        let sandbox = runtime.start(&template, spec).unwrap();
        let exit = sandbox.wait(PATIENCE).unwrap();
        assert_eq!(
            text(&exit.stdout),
            "0\n1\nagain\n",
            "{}",
            text(&exit.stderr)
        );
    }
    // The control: it is the limit that does it.
    let exit = shell(
        &runtime,
        &template,
        "head -c 1000000 /dev/zero > /tmp/b; echo $?",
    );
    assert_eq!(text(&exit.stdout), "0\n");
}

#[test]
fn a_share_of_a_processor_is_all_that_a_sandbox_gets() {
    carlsbad_kit::require!(
        Capability::Kvm,
        Capability::Root,
        Capability::ControlGroups,
        Capability::Busybox
    );
    let Some(runtime) = limited("share") else {
        return;
    };
    if !Hierarchy::detect().unwrap().has(Controller::Cpuacct) {
        return;
    }
    let root = root();
    let template = busybox(&runtime, root.path());
    // It never ends, and is stopped after a second.
    let share_of = |cpus| {
        let mut limits = Limits::default();
        (limits.cpus, limits.run_time) = (cpus, Some(Duration::from_secs(1)));
        let args = ["busybox", "sh", "-c", "while :; do :; done"];
        let spec = CloneSpec::new().args(args).limits(limits);
        let exit = runtime
            .start(&template, spec)
            .unwrap()
            .wait(PATIENCE)
            .unwrap();
        assert_eq!(exit.status, Status::TimedOut);
        let used = exit.stats.usage.unwrap().cpu.unwrap();
        used.as_secs_f64() / exit.stats.run.as_secs_f64()
    };
    let limited = share_of(Some(0.2));
    assert!(limited < 0.35, "{limited} of a processor instead of 0.2");
    // The control, on a machine where others may run: without the limit it has more.
    let free = share_of(None);
    assert!(free > limited * 1.3, "{limited} limited, {free} free");
}

/// What `greedy` says that it got, with so much for its writable layer.
fn greedy(runtime: &Runtime, mode: &str, most: u32, limits: &Limits) -> Exit {
    let dir = tempfile::tempdir().unwrap();
    let root = root();
    let program = c_program(dir.path(), "greedy").unwrap();
    let template = runtime
        .prepare(&TemplateSpec::new(program).root(root.path()))
        .unwrap();
    let mut exits = [Reuse::Reset, Reuse::Reset, Reuse::Fresh].map(|reuse| {
        let spec = CloneSpec::new()
            .args(["greedy", mode, &most.to_string()])
            .limits(limits.clone())
            .reuse(reuse);
        let exit = runtime.start(&template, spec).unwrap();
        exit.wait(PATIENCE).unwrap()
    });
    for exit in &exits {
        assert!(exit.status.success(), "{exit:?}");
        // Whoever has served before gives the next one as much.
        assert_eq!(text(&exit.stdout), text(&exits[0].stdout));
        assert_eq!(exit.truncated, exits[0].truncated);
    }
    std::mem::replace(&mut exits[0], Exit::new(Status::Code(0)))
}

fn upper(size: ByteSize) -> Limits {
    let mut limits = Limits::default();
    limits.upper = size;
    limits
}

#[test]
fn processes_are_counted_for_the_whole_sandbox() {
    carlsbad_kit::require!(Capability::Kvm);
    let runtime = runtime();
    let mut limits = Limits::default();
    limits.processes = Some(4);
    let exit = greedy(&runtime, "chain", 0, &limits);
    assert_eq!(text(&exit.stdout), "processes 4 EAGAIN\n");
}

#[test]
fn captured_output_is_counted_for_the_whole_sandbox() {
    carlsbad_kit::require!(Capability::Kvm);
    let runtime = runtime();
    let mut limits = Limits::default();
    limits.output = ByteSize::new(2500);
    let exit = greedy(&runtime, "output", 5, &limits);
    assert_eq!((exit.stdout.len(), exit.truncated), (2500, true));
    limits.output = ByteSize::new(5000);
    let exit = greedy(&runtime, "output", 5, &limits);
    assert_eq!((exit.stdout.len(), exit.truncated), (5000, false));
}

#[test]
fn what_is_in_the_writable_layer_counts_and_what_is_gone_does_not() {
    carlsbad_kit::require!(Capability::Kvm);
    let runtime = runtime();
    let said = |mode, most, size| text(&greedy(&runtime, mode, most, &upper(size)).stdout);
    // A name costs a page.
    let small = ByteSize::kib(400);
    assert_eq!(said("links", 1000, small), "links 100 ENOSPC\n");
    assert_eq!(said("directories", 1000, small), "directories 100 ENOSPC\n");
    // Files without a name count for as long as they are open.
    let large = ByteSize::new((8 << 20) + 8 * 4096);
    assert_eq!(said("unlinked", 50, large), "unlinked 8 ENOSPC\n");
    for mode in ["temporary", "truncate", "rename"] {
        assert_eq!(said(mode, 50, large), format!("{mode} 50 no error\n"));
    }
}

#[test]
fn processes_may_change_the_writable_layer_together() {
    carlsbad_kit::require!(Capability::Kvm);
    let runtime = runtime();
    let exit = greedy(&runtime, "together", 40, &Limits::default());
    // What the file had, and what four processes have appended.
    let bytes = "pear\napple\nfig\napple\nbanana\n".len() + 4 * 40 * 5;
    assert_eq!(text(&exit.stdout), format!("bytes {bytes}\n"));
}

#[test]
fn directories_however_deep_are_a_clones_own() {
    carlsbad_kit::require!(Capability::Kvm);
    // The next clone of the same monitor makes the same.
    let exit = greedy(&runtime(), "deep", 300, &Limits::default());
    assert_eq!(text(&exit.stdout), "deep 300 no error\n");
}

#[test]
fn who_is_killed_has_said_what_it_has_said() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    // Written, waiting in a call of the host's; written and busy; with a process of its own.
    for script in [
        "echo said; echo too >&2; sleep 1000",
        "echo said; echo too >&2; while :; do :; done",
        "echo said; echo too >&2; sleep 1000 | cat",
    ] {
        for asks_first in [true, false] {
            let args = ["busybox", "sh", "-c", script];
            let sandbox = runtime
                .start(&template, CloneSpec::new().args(args))
                .unwrap();
            std::thread::sleep(Duration::from_millis(if is_slow() { 5000 } else { 300 }));
            let kill = sandbox.kill_handle();
            let killer = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                kill.kill().unwrap();
            });
            if !asks_first {
                killer.join().unwrap();
            }
            let exit = sandbox.wait(PATIENCE).unwrap();
            assert_eq!(exit.status, Status::Signal(SIGKILL));
            assert_eq!(text(&exit.stdout), "said\n", "{script}");
            assert_eq!(text(&exit.stderr), "too\n", "{script}");
            assert!(exit.stats.split_rootfs);
            assert!(exit.stats.exits > 0);
        }
    }
    // The machines are as good as before.
    let exit = shell(&runtime, &template, "echo next");
    assert_eq!(text(&exit.stdout), "next\n");
}

#[test]
fn time_ends_a_sandbox_that_nobody_waits_for() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let mut limits = Limits::default();
    limits.run_time = Some(Duration::from_millis(300));
    let spec = CloneSpec::new().args(["busybox", "yes"]).limits(limits);
    let sandbox = runtime.start(&template, spec).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let exit = sandbox.wait(PATIENCE).unwrap();
    assert_eq!(exit.status, Status::TimedOut);
    assert!(exit.stats.run < Duration::from_secs(2), "{:?}", exit.stats);
    assert!(!exit.stdout.is_empty() && exit.truncated);
}

#[test]
fn input_may_be_long_and_patience_endless() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let mut spec = TemplateSpec::new(BUSYBOX).root(root.path());
    spec.inside = Some("/bin/busybox".into());
    spec.deadline = Duration::MAX;
    let template = runtime.prepare(&spec).unwrap();
    let input = vec![b'x'; 300 << 20];
    let spec = CloneSpec::new()
        .args(["busybox", "wc", "-c"])
        .stdin(Stdin::Bytes(input));
    let exit = runtime.start(&template, spec).unwrap();
    let exit = exit.wait(Some(Duration::MAX)).unwrap();
    assert_eq!(text(&exit.stdout).trim(), (300 << 20).to_string());
}

#[test]
fn no_room_for_a_writable_layer_is_a_read_only_root() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let script = "echo x > /new; echo x >> /data/words; rm /data/numbers; mkdir /d; mv /data /e; \
                  ln -s x /l; chmod 700 /data; touch /data/words";
    let args = ["busybox", "sh", "-c", script];
    let spec = CloneSpec::new().args(args).limits(upper(ByteSize::ZERO));
    let exit = runtime.start(&template, spec).unwrap();
    let exit = exit.wait(PATIENCE).unwrap();
    let said = text(&exit.stderr);
    assert_eq!(said.matches("Read-only file system").count(), 8, "{said}");
    assert!(!exit.stats.split_rootfs);
}
