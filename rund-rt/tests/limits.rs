//! What a sandbox may use is its own affair: who takes too much is stopped, and nobody else is.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;

use carlsbad_kit::capability::Capability;
use carlsbad_types::ByteSize;
use rund_rt::cgroup::{CgroupPool, Controller, Hierarchy, PoolConfig};
use rund_rt::{
    CloneSpec, Error, Limits, Output, Reuse, Runtime, SnapshotPoint, Status, Stdin, TemplateSpec,
};

use common::{BUSYBOX, PATIENCE, busybox, c_program, root, runtime, shell, text};

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
    assert!(exit.stats.pooled_cgroup || exit.stdout.is_empty());

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
