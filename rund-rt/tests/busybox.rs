//! Unmodified busybox in `kvm-elf` says what it says on the host: standard output, standard error
//! and exit code, byte by byte.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::path::Path;
use std::process::Command;

use carlsbad_kit::capability::Capability;
use rund_rt::{CloneSpec, Limits};

use common::{busybox, is_slow, root, run, runtime, text};

/// Shell scripts, one a line; lines that begin with a space go on with the one before.
const CASES: &str = include_str!("busybox_cases.txt");

fn cases() -> Vec<String> {
    let mut cases: Vec<String> = Vec::new();
    for line in CASES.lines().filter(|line| !line.is_empty()) {
        match (line.strip_prefix(' '), cases.last_mut()) {
            (Some(rest), Some(last)) => {
                last.push('\n');
                last.push_str(rest);
            }
            _ => cases.push(line.to_owned()),
        }
    }
    cases
}

fn shell_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .expect("it has ended")
}

#[test]
fn busybox_in_a_sandbox_says_what_it_says_on_the_host() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Root, Capability::Busybox);
    let runtime = runtime();
    let shared = root();
    let template = busybox(&runtime, shared.path());
    let mut cases = cases();
    assert!(cases.len() >= 200, "{} cases", cases.len());
    if is_slow() {
        cases = cases.into_iter().step_by(4).collect();
    }
    let chroot = ["/usr/sbin/chroot", "/bin/chroot"];
    let chroot = chroot.iter().find(|path| Path::new(path).exists());
    let chroot = chroot.expect("a chroot");
    let mut wrong = Vec::new();
    for case in &cases {
        // The host's one writes: it gets a root of its own each time.
        let own = root();
        for (name, minor) in [("null", "3"), ("zero", "5"), ("urandom", "9")] {
            let device = own.path().join("dev").join(name);
            let mut mknod = Command::new("mknod");
            mknod.arg(device).args(["-m", "666", "c", "1", minor]);
            assert!(mknod.status().unwrap().success());
        }
        let host = Command::new(chroot)
            .arg(own.path())
            .args(["/bin/busybox", "sh", "-c", case])
            .env_clear()
            .env("PATH", "/bin")
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let mut limits = Limits::default();
        limits.run_time = Some(std::time::Duration::from_secs(20));
        let args = ["/bin/busybox", "sh", "-c", case];
        let spec = CloneSpec::new().args(args).limits(limits);
        let ours = run(&runtime, &template, spec);
        let same = ours.stdout == host.stdout
            && ours.stderr == host.stderr
            && ours.status.shell_code() == shell_code(host.status);
        if !same {
            wrong.push(format!(
                "{case}\n  host {:?} {:?} {:?}\n  ours {:?} {:?} {:?}",
                host.status.code(),
                text(&host.stdout),
                text(&host.stderr),
                ours.status,
                text(&ours.stdout),
                text(&ours.stderr),
            ));
        }
    }
    println!(
        "{} of {} cases equal",
        cases.len() - wrong.len(),
        cases.len()
    );
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    // The control: what a sandbox wrote is in no other, and not in the root.
    assert!(!shared.path().join("tmp/new").exists());
}
