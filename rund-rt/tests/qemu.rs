//! The backend `qemu`: a real Linux guest, booted once and cloned.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "qemu/early.rs"]
mod early;

use std::collections::HashSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::{Capability, condensed_kernel, guest_kernel};
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

/// Bytes of a file of the image that every guest reads.
const LOWER: usize = 8 << 20;

/// An erofs image with busybox and a file that nothing can compress.
fn image(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    for name in ["bin", "etc"] {
        fs::create_dir_all(tree.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "md5sum", "hostname", "sleep", "wc"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    let mut rng = carlsbad_kit::seed::rng("image");
    let bytes: Vec<u8> = (0..LOWER).map(|_| rng.u8(..)).collect();
    fs::write(tree.join("etc/lower"), bytes).unwrap();
    let image = dir.join("image.erofs");
    let made = Command::new("mkfs.erofs").arg(&image).arg(&tree).output();
    assert!(made.unwrap().status.success());
    image
}

/// Pages of the file that are in the page cache.
fn cached_pages(path: &Path) -> usize {
    let file = fs::File::open(path).unwrap();
    let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let mut pages = vec![0u8; len.div_ceil(4096)];
    let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    // SAFETY: a new mapping, where the kernel likes.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, read, shared, file.as_raw_fd(), 0) };
    assert_ne!(at, libc::MAP_FAILED);
    // SAFETY: the mapping has this length, and `pages` one byte for each page of it.
    assert_eq!(unsafe { libc::mincore(at, len, pages.as_mut_ptr()) }, 0);
    // SAFETY: nothing refers to the mapping, which has not been read.
    unsafe { libc::munmap(at, len) };
    pages.iter().filter(|page| **page & 1 == 1).count()
}

#[test]
fn a_split_root_is_in_the_hosts_memory_once_and_its_upper_layers_are_apart() {
    carlsbad_kit::require!(
        Capability::Qemu,
        Capability::CondensedKernel,
        Capability::ErofsTools,
        Capability::Busybox
    );
    const GUESTS: usize = 20;
    let dir = scratch::on_disk().unwrap();
    let image = image(dir.path());
    let before = fs::read(&image).unwrap();
    let spec = spec(dir.path(), condensed_kernel().unwrap()).root(&image);
    let guard = LeakGuard::beneath(dir.path());
    let qemu = Qemu::new();
    let template = qemu.build_template(&spec).unwrap();

    // Out of the page cache, but for what somebody holds.
    let file = fs::File::open(&image).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let pages = before.len().div_ceil(4096);
    let cached = cached_pages(&image);
    assert!(cached < pages / 2, "{cached} of {pages} pages stayed");

    // Each reads all of the file, and stays.
    let script = "echo $(md5sum < /etc/lower) > /tmp/sum; sleep 1000";
    let clones: Vec<_> = (0..GUESTS)
        .map(|_| qemu.clone_from(&template, shell(script)).unwrap())
        .collect();
    let start = Instant::now();
    let lower = (LOWER / 4096) as u64;
    for clone in &clones {
        while clone.stats().unwrap().dirty_pages < lower {
            assert!(start.elapsed() < PATIENCE.unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // A page cache is of an inode: it is the same in all of them, and is used.
    let cached = cached_pages(&image);
    assert!(
        cached >= LOWER / 4096,
        "{cached} of {pages} pages are cached"
    );
    let inode = file.metadata().unwrap().ino();
    for clone in &clones {
        let stats = clone.stats().unwrap();
        assert!(stats.split_rootfs && stats.template_hit);
        let files = fs::read_dir(format!("/proc/{}/fd", stats.pid.unwrap())).unwrap();
        let disks = files
            .filter_map(|file| fs::metadata(file.ok()?.path()).ok())
            .filter(|file| file.ino() == inode)
            .count();
        assert!(disks >= 1);
    }
    drop(clones);

    // What one writes no other sees, and it is not in the image.
    let script = "test ! -e /etc/mine && hostname > /etc/mine && echo x >> /etc/lower && \
                  cat /etc/mine && wc -c < /etc/lower && test ! -e /bin/rund-agent";
    let clones: Vec<_> = (0..3)
        .map(|n| {
            let clone = shell(script).id(format!("guest-{n}"));
            qemu.clone_from(&template, clone).unwrap()
        })
        .collect();
    for (n, clone) in clones.iter().enumerate() {
        let exit = clone.wait(PATIENCE).unwrap();
        let said = String::from_utf8_lossy(&exit.stdout).into_owned();
        assert_eq!(said, format!("guest-{n}\n{}\n", LOWER + 2));
        assert_eq!(exit.status, Status::Code(0));
    }
    assert!(fs::read(&image).unwrap() == before);
    drop((clones, template, file));
    guard.check();

    // No image, no root.
    let mut bad = spec.clone().root(dir.path());
    assert!(matches!(
        qemu.build_template(&bad),
        Err(Error::Rootfs { .. })
    ));
    bad.root = Some(spec.initramfs.clone().unwrap());
    assert!(matches!(
        qemu.build_template(&bad),
        Err(Error::Rootfs { .. })
    ));
}

#[test]
fn no_page_of_a_kernels_text_is_a_clones_own_because_it_was_saved_after_patching() {
    carlsbad_kit::require!(
        Capability::Qemu,
        Capability::CondensedKernel,
        Capability::Busybox
    );
    let kernel = condensed_kernel().unwrap();
    let symbols = early::Symbols::beside(&kernel);
    let dir = scratch::on_disk().unwrap();
    let spec = spec(dir.path(), kernel.clone());
    let qemu = Qemu::new();
    let template = qemu.build_template(&spec).unwrap();
    // It reads, writes and makes processes; 4 MiB later it has done so.
    let script = "for n in 1 2 3; do ls /bin | sort | md5sum; done > /tmp/x; \
                  head -c 4194304 /dev/zero > /tmp/y; sleep 1000";
    let clone = qemu.clone_from(&template, shell(script)).unwrap();
    let start = Instant::now();
    while clone.stats().unwrap().dirty_pages < 1024 {
        assert!(start.elapsed() < PATIENCE.unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = clone.pid().unwrap();
    let (own, all) = symbols.private_text(pid, "memfd:rund-qemu");
    println!("saved after patching: {own} of {all} pages of text are the clone's own");
    assert!(all > 500);
    assert_eq!(own, 0);

    // The control: saved when it was about to patch itself.
    let place = scratch::on_tmpfs().unwrap();
    let initramfs = spec.initramfs.clone().unwrap();
    let patches = symbols.get("alternative_instructions");
    let early = early::Machine::cloned_at(place.path(), &kernel, &initramfs, patches);
    let memory = place.path().join("memory");
    let (own, all) = symbols.private_text(early.child.id(), memory.to_str().unwrap());
    println!("saved before patching: {own} of {all} pages of text are the clone's own");
    assert!(own > 0);
}

#[test]
fn a_clone_that_was_made_ahead_waits_for_its_order() {
    carlsbad_kit::require!(
        Capability::Qemu,
        Capability::GuestKernel,
        Capability::Busybox
    );
    let dir = scratch::on_disk().unwrap();
    let spec = spec(dir.path(), guest_kernel().unwrap());
    let guard = LeakGuard::beneath(dir.path());
    let qemu = Qemu::new();
    let template = qemu.build_template(&spec).unwrap();
    // Only those stand still and read a state: other tests have machines as well.
    let waiting = || {
        let is_one = |pid: i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            words.contains(&&b"-S"[..])
                && words.contains(&&b"-incoming"[..])
                && status.contains(&format!("PPid:\t{}\n", std::process::id()))
        };
        let all = fs::read_dir("/proc").unwrap();
        all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| is_one(*pid))
            .collect::<HashSet<i32>>()
    };
    qemu.prewarm(&template, 3).unwrap();
    qemu.prewarm(&template, 2).unwrap();
    let held = waiting();
    assert_eq!(held.len(), 3);

    // Two that waited, of which one is gone; each has a name, and random numbers, of its own.
    let pid = rustix::process::Pid::from_raw(*held.iter().next().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let mut said = HashSet::new();
    let mut waited = 0;
    for n in 0..4 {
        let clone = shell("hostname; head -c 16 /dev/urandom | xxd -p").id(format!("guest-{n}"));
        let clone = qemu.clone_from(&template, clone).unwrap();
        let pid = i32::try_from(clone.pid().unwrap()).unwrap();
        waited += u32::from(held.contains(&pid));
        let exit = clone.wait(PATIENCE).unwrap();
        assert_eq!(exit.status, Status::Code(0));
        let text = String::from_utf8_lossy(&exit.stdout).into_owned();
        assert!(text.starts_with(&format!("guest-{n}\n")), "{text}");
        said.extend(text.lines().map(str::to_owned));
    }
    assert_eq!((waited, said.len()), (2, 8));

    // Those that nobody wanted go with the template.
    qemu.prewarm(&template, 2).unwrap();
    drop(template);
    assert!(waiting().is_empty());
    guard.check();
}
