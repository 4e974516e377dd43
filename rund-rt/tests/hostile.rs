//! Programs and guests that mean no good, or know no better.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::path::Path;

use carlsbad_kit::capability::Capability;
use carlsbad_types::ByteSize;
use rund_rt::{CloneSpec, Error, Exit, Isolation, Limits, Status, TemplateSpec};

use common::{BUSYBOX, busybox, c_program, root, run, runtime, shell, text};

#[test]
fn a_hostile_guest_harms_itself_alone() {
    carlsbad_kit::require!(Capability::Kvm);
    let dir = tempfile::tempdir().unwrap();
    let program = c_program(dir.path(), "hostile").unwrap();
    let runtime = runtime();
    let template = runtime.prepare(&TemplateSpec::new(&program)).unwrap();
    let attack = |what: &str| -> Exit {
        let mut limits = Limits::default();
        limits.run_time = Some(std::time::Duration::from_secs(20));
        limits.processes = Some(8);
        limits.upper = ByteSize::mib(1);
        let spec = CloneSpec::new().args(["hostile", what]).limits(limits);
        run(&runtime, &template, spec)
    };
    let faults = |what: &str, signal: i32| {
        let exit = attack(what);
        assert_eq!(
            exit.status,
            Status::Signal(signal),
            "{what}: {}",
            text(&exit.stdout)
        );
    };
    for what in [
        "null", "tables", "code", "text", "stack", "cli", "hlt", "out", "in", "in80", "insb",
        "out82", "cr3", "wrmsr", "lidt",
    ] {
        faults(what, libc::SIGSEGV);
    }
    // One kind of KVM calls it an undefined instruction, the other a protection fault.
    let int80 = attack("int80").status;
    let either = [libc::SIGILL, libc::SIGSEGV].map(Status::Signal);
    assert!(either.contains(&int80), "{int80:?}");
    faults("ud2", libc::SIGILL);
    faults("div", libc::SIGFPE);
    faults("recurse", libc::SIGSEGV);
    assert_eq!(attack("handler").status, Status::Code(70));
    assert_eq!(text(&attack("pointers").stdout), "alive\n");
    assert_eq!(text(&attack("write").stderr), "0 wrong\n");
    // In ring 0 the entry must not be trapped; at the guest's own privilege that harms itself alone.
    let trap = text(&attack("trap").stdout);
    let harmless = runtime.capabilities().isolation == Isolation::PvmVm && trap.is_empty();
    assert!(harmless || trap == "same\n", "{trap}");
    // The guest that lies to the shim may end in any way; whoever comes next is not touched.
    attack("shim");
    assert_eq!(text(&attack("cs").stdout), "0x33 0x33\n");
    assert_eq!(text(&attack("memory").stdout), "refused after many MiB\n");
    assert_eq!(text(&attack("forks").stdout), "refused\n");
    let fill = text(&attack("fill").stdout);
    // It writes 64 KiB at a time, and the file's name costs a page.
    assert_eq!(fill, format!("refused after {}\n", (1 << 20) - (64 << 10)));
    assert_eq!(text(&attack("cs").stdout), "0x33 0x33\n");
}

#[test]
fn no_path_leads_out_of_the_root() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "secret").unwrap();
    let path = secret.path().display();
    for script in [
        format!("cat {path}"),
        format!("cat ../../../../../../../..{path}"),
        format!("ln -s {path} /tmp/l; cat /tmp/l"),
        format!("ln -s ../../../../../..{path} /tmp/l; cat /tmp/l"),
        format!("ln -s / /tmp/r; cat /tmp/r{path}"),
        format!("cd /tmp; mkdir a; cd a; cat ../../..{path}"),
        format!("mkdir -p /proc/self; ln -s {path} /proc/self/root; cat /proc/self/root"),
    ] {
        let exit = shell(&runtime, &template, &script);
        assert!(!text(&exit.stdout).contains("secret"), "{script}");
        assert_ne!(exit.status, Status::Code(0), "{script}");
    }
    let ours = shell(&runtime, &template, "cat /data/escape");
    assert_eq!(text(&ours.stdout), "root:x:0:0:root:/:/bin/sh\n");
}

fn refused(path: &Path) -> String {
    match runtime().prepare(&TemplateSpec::new(path)) {
        Err(Error::BadProgram { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_static_elf_is_refused_with_the_reason() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let file = tempfile::NamedTempFile::new().unwrap();
    let whole = std::fs::read(BUSYBOX).unwrap();
    let with = |bytes: &[u8]| {
        std::fs::write(file.path(), bytes).unwrap();
        refused(file.path())
    };
    assert!(with(b"").contains("no ELF"));
    assert!(with(b"#!/bin/sh\n").contains("no ELF"));
    assert!(with(&whole[..60]).contains(""));
    assert!(with(&whole[..whole.len() / 2]).contains("beyond the file"));
    let mut other_machine = whole.clone();
    other_machine[18] = 0xb7;
    assert!(with(&other_machine).contains("x86-64"));
    assert!(refused(Path::new(env!("CARGO_BIN_EXE_rund"))).contains("dynamically"));
    assert!(refused(Path::new("/nothing/here")).contains("No such file"));
    assert!(refused(Path::new("/tmp")).contains("directory"));
    let nowhere = {
        let mut spec = TemplateSpec::new(BUSYBOX).root("/tmp");
        spec.cwd = "/nothing/here".into();
        runtime().prepare(&spec)
    };
    assert!(
        matches!(nowhere, Err(Error::BadProgram { .. })),
        "{nowhere:?}"
    );
}

#[test]
fn settings_that_cannot_be_are_refused() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    for memory in [ByteSize::ZERO, ByteSize::mib(4), ByteSize::gib(64)] {
        let spec = TemplateSpec::new(BUSYBOX).memory(memory);
        let refused = runtime.prepare(&spec);
        assert!(
            matches!(refused, Err(Error::BadProgram { .. })),
            "{refused:?}"
        );
    }
    let never = TemplateSpec::new(BUSYBOX)
        .args(["busybox", "true"])
        .snapshot(rund_rt::SnapshotPoint::FirstInput);
    let refused = runtime.prepare(&never);
    assert!(
        matches!(refused, Err(Error::NoSnapshot { .. })),
        "{refused:?}"
    );
    let mut endless = TemplateSpec::new(BUSYBOX)
        .args(["busybox", "sh", "-c", "while :; do :; done"])
        .snapshot(rund_rt::SnapshotPoint::FirstInput);
    endless.deadline = std::time::Duration::from_millis(200);
    let refused = runtime.prepare(&endless);
    assert!(
        matches!(refused, Err(Error::NoSnapshot { .. })),
        "{refused:?}"
    );
    let template = runtime.prepare(&TemplateSpec::new(BUSYBOX)).unwrap();
    let long = "x".repeat(3 << 20);
    let spec = CloneSpec::new().args(["busybox", "echo", &long]);
    let refused = runtime
        .start(&template, spec)
        .and_then(|s| s.wait(common::PATIENCE));
    assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
}

#[test]
fn without_kvm_the_backend_says_how_to_get_it() {
    use std::process::Command;
    // As a user who may not open the device.
    carlsbad_kit::require!(Capability::Root);
    if !Path::new("/dev/kvm").exists() {
        return;
    }
    let out = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(env!("CARGO_BIN_EXE_rund"))
        .args(["--json", "probe"])
        .output()
        .unwrap();
    // A tree that only root may enter says nothing about the device.
    if text(&out.stderr).contains("setpriv") {
        return;
    }
    assert_eq!(out.status.code(), Some(121), "{out:?}");
    assert!(
        text(&out.stderr).contains("join the group of /dev/kvm"),
        "{out:?}"
    );
}

#[test]
fn a_root_without_rights_is_nobody_elses_affair() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    for _ in 0..3 {
        let script = "echo x > /made; chmod 0 /; exit 7";
        let args = ["busybox", "sh", "-c", script];
        let sandbox = runtime
            .start(&template, CloneSpec::new().args(args))
            .unwrap();
        let first = sandbox.wait(common::PATIENCE).unwrap();
        assert_eq!(first.status, Status::Code(7));
        let _reset = sandbox.stats().unwrap();
        let again = sandbox.wait(common::PATIENCE).unwrap();
        assert_eq!((again.status, again.stdout), (first.status, first.stdout));
    }
    let exit = shell(&runtime, &template, "ls /made 2>/dev/null; echo rest");
    assert_eq!(text(&exit.stdout), "rest\n");
}

#[test]
fn a_program_of_a_root_is_never_the_hosts() {
    use std::os::unix::fs::symlink;
    let root = root();
    symlink("/bin/busybox", root.path().join("absolute")).unwrap();
    symlink("/etc/hostname", root.path().join("outside")).unwrap();
    symlink("../../../../../../usr/bin/env", root.path().join("climbs")).unwrap();
    let found = TemplateSpec::in_root(root.path(), "/absolute").unwrap();
    let real = root.path().canonicalize().unwrap();
    assert_eq!(found.program, real.join("bin/busybox"));
    assert_eq!(found.path_inside(), Path::new("/absolute"));
    for inside in ["/outside", "/climbs", "/data", "/nothing", "/usr/bin/env"] {
        let refused = TemplateSpec::in_root(root.path(), inside);
        assert!(matches!(refused, Err(Error::BadProgram { .. })), "{inside}");
    }
}
