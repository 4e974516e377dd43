//! The backend `qemu`: a real Linux guest, booted once and cloned.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use carlsbad_kit::capability::{Capability, guest_kernel};
use carlsbad_kit::leak::LeakGuard;
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use rund_rt::{
    Backend, CloneSpec, Error, Isolation, Limits, Qemu, Status, Stdin, TemplateSpec, qemu_initramfs,
};

const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

fn spec(dir: &Path, kernel: PathBuf) -> TemplateSpec {
    let initramfs = dir.join("initramfs");
    let bytes = qemu_initramfs(Path::new("/bin/busybox"), &[]).unwrap();
    fs::write(&initramfs, bytes).unwrap();
    let mut spec = TemplateSpec::new(kernel).memory(ByteSize::mib(128));
    spec.initramfs = Some(initramfs);
    spec.env = vec!["PATH=/bin".into()];
    spec
}

fn shell(script: &str) -> CloneSpec {
    CloneSpec::new().args(["sh", "-c", script])
}

#[test]
fn guests_are_cloned_from_one_that_had_booted() {
    carlsbad_kit::require!(
        Capability::Qemu,
        Capability::GuestKernel,
        Capability::Busybox
    );
    let kernel = guest_kernel().unwrap();
    let dir = scratch::on_disk().unwrap();
    let spec = spec(dir.path(), kernel);
    let guard = LeakGuard::beneath(dir.path());
    let qemu = Qemu::new();
    let found = qemu.probe().unwrap();
    let template = qemu.build_template(&spec).unwrap();
    assert!(template.size() > ByteSize::mib(16));
    assert!(matches!(
        found.isolation,
        Isolation::EmulatedVm | Isolation::HardwareVm
    ));

    // Input, output, exit code; a kernel of its own.
    let script = "cat; uname -r; exit 7";
    let input = Stdin::Bytes(b"it's\nme\n".to_vec());
    let clone = qemu
        .clone_from(&template, shell(script).stdin(input))
        .unwrap();
    let exit = clone.wait(PATIENCE).unwrap();
    let said = String::from_utf8_lossy(&exit.stdout).into_owned();
    assert_eq!(exit.status, Status::Code(7), "{said}");
    assert!(said.starts_with("it's\nme\n6."), "{said}");
    assert_eq!(exit.stats.isolation, Some(found.isolation));

    // Clones differ in name, clock and entropy, and share nothing that they write.
    let script = "hostname; cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | xxd -p; \
                  test ! -e /tmp/x && echo x > /tmp/x && date +%s";
    let clones: Vec<_> = (0..3)
        .map(|n| {
            qemu.clone_from(&template, shell(script).id(format!("guest-{n}")))
                .unwrap()
        })
        .collect();
    let mut lines = HashSet::new();
    for (n, clone) in clones.iter().enumerate() {
        let exit = clone.wait(PATIENCE).unwrap();
        let said = String::from_utf8_lossy(&exit.stdout).into_owned();
        let words: Vec<_> = said.lines().map(str::to_owned).collect();
        assert_eq!(
            (words.len(), &words[0]),
            (4, &format!("guest-{n}")),
            "{said}"
        );
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let then: u64 = words[3].parse().unwrap();
        assert!(now.unwrap().as_secs().abs_diff(then) < 60);
        lines.extend(words[1..3].iter().cloned());
    }
    assert_eq!(lines.len(), 6);

    // Stopped, resumed, killed; and out of time.
    let clone = qemu.clone_from(&template, shell("sleep 1000")).unwrap();
    clone.pause().unwrap();
    clone.resume().unwrap();
    assert!(matches!(
        clone.wait(Some(Duration::from_millis(10))),
        Err(Error::DeadlineExceeded { .. })
    ));
    clone.kill_handle().kill().unwrap();
    assert_eq!(clone.wait(PATIENCE).unwrap().status, Status::Signal(9));
    let mut limits = Limits::default();
    limits.run_time = Some(Duration::from_millis(300));
    let late = qemu
        .clone_from(&template, shell("while :; do :; done").limits(limits))
        .unwrap();
    assert_eq!(late.wait(PATIENCE).unwrap().status, Status::TimedOut);
    drop((clone, late, clones, template));
    guard.check();
}

#[test]
fn guests_that_do_not_boot_are_refused_in_time() {
    carlsbad_kit::require!(
        Capability::Qemu,
        Capability::GuestKernel,
        Capability::Busybox
    );
    let kernel = guest_kernel().unwrap();
    let dir = scratch::on_disk().unwrap();
    let qemu = Qemu::new();
    let mut spec = spec(dir.path(), kernel);
    let good = spec.initramfs.clone();
    spec.initramfs = None;
    assert!(matches!(
        qemu.build_template(&spec),
        Err(Error::BadSetting { .. })
    ));
    // No init: the kernel panics, and QEMU ends.
    let empty = dir.path().join("empty");
    fs::write(&empty, b"").unwrap();
    spec.initramfs = Some(empty);
    let refused = qemu.build_template(&spec).unwrap_err();
    assert!(matches!(refused, Error::NoSnapshot { .. }), "{refused}");
    // Too little time.
    spec.initramfs = good;
    spec.deadline = Duration::from_millis(200);
    let start = Instant::now();
    let refused = qemu.build_template(&spec).unwrap_err();
    assert!(
        matches!(refused, Error::NoSnapshot { .. } | Error::Qemu { .. }),
        "{refused}"
    );
    assert!(start.elapsed() < Duration::from_secs(30));
    // No kernel, and no QEMU.
    fs::write(dir.path().join("kernel"), b"not a kernel").unwrap();
    spec.program = dir.path().join("kernel");
    spec.deadline = Duration::from_secs(5);
    assert!(qemu.build_template(&spec).is_err());
    let nowhere = Qemu::new().program("/nowhere/qemu");
    assert!(matches!(nowhere.probe(), Err(Error::Unavailable { .. })));
}
