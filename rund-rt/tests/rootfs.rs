//! Root file systems split in two: shared below, private above, gone with their owner.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Role, kill_at_random};
use carlsbad_kit::{leak::LeakGuard, scratch, seed};
use carlsbad_types::ByteSize;
use rund_rt::Error;
use rund_rt::rootfs::{
    Copied, Format, Image, Layer, LayerLimits, RootfsConfig, RootfsStore, Upper, copy_file, sweep,
    unpack,
};

fn config(run_dir: &Path, upper: Upper) -> RootfsConfig {
    let mut config = RootfsConfig::default();
    (config.run_dir, config.upper) = (run_dir.to_owned(), upper);
    config
}

const SHARED: Upper = Upper::Shared {
    size: ByteSize::mib(64),
};
const OWN: Upper = Upper::Own {
    size: ByteSize::mib(1),
};

/// A small tree: `etc/name` and `big`, 300 kB.
fn tree(at: &Path) -> PathBuf {
    let tree = at.join("tree");
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/name"), "image\n").unwrap();
    fs::write(tree.join("big"), vec![7; 300_000]).unwrap();
    symlink("etc/name", tree.join("link")).unwrap();
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o751)).unwrap();
    tree
}

fn formats() -> Vec<Format> {
    let has = |program: &str| {
        let found = std::process::Command::new(program).arg("--help").output();
        found.is_ok()
    };
    let mut formats = vec![Format::Directory];
    formats.extend(has("mkfs.erofs").then_some(Format::Erofs));
    formats.extend(has("mksquashfs").then_some(Format::Squashfs));
    formats
}

#[test]
fn what_one_sandbox_writes_no_other_sees() {
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let dir = scratch::on_disk().unwrap();
    let layers = [Layer::Directory(tree(dir.path()))];
    let guard = LeakGuard::beneath(dir.path());
    for format in formats() {
        for upper in [SHARED, OWN] {
            let path = dir.path().join(format!("{format:?}-{upper:?}"));
            let image = Image::build(&layers, &path, format, &LayerLimits::default()).unwrap();
            let store = RootfsStore::open(&config(&dir.path().join("run"), upper)).unwrap();
            let lower = store.lower(&image).unwrap();
            let roots: Vec<_> = (0..8).map(|_| store.split(&lower).unwrap()).collect();
            for (n, root) in roots.iter().enumerate() {
                let path = root.path();
                assert_eq!(fs::read(path.join("link")).unwrap(), b"image\n");
                assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o751);
                fs::write(path.join("etc/name"), n.to_string()).unwrap();
                fs::write(path.join("new"), n.to_string()).unwrap();
                fs::remove_file(path.join("big")).unwrap();
            }
            for (n, root) in roots.iter().enumerate() {
                let read = |name: &str| fs::read_to_string(root.path().join(name)).unwrap();
                assert_eq!(
                    (read("etc/name"), read("new")),
                    (n.to_string(), n.to_string())
                );
                assert!(!root.path().join("big").exists());
            }
            // Nothing of it is in the image, nor in what is made of it afterwards.
            drop(roots);
            let fresh = store.split(&lower).unwrap();
            assert_eq!(fs::read(fresh.path().join("etc/name")).unwrap(), b"image\n");
            assert_eq!(
                fs::metadata(fresh.path().join("big")).unwrap().len(),
                300_000
            );
        }
    }
    guard.check();
    assert_eq!(fs::read_dir(dir.path().join("run")).unwrap().count(), 0);
}

#[test]
fn a_full_writable_layer_is_enospc_for_its_sandbox_alone() {
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let dir = scratch::on_disk().unwrap();
    let image = Image::directory(tree(dir.path())).unwrap();
    let store = RootfsStore::open(&config(&dir.path().join("run"), OWN)).unwrap();
    let lower = store.lower(&image).unwrap();
    let (full, other) = (store.split(&lower).unwrap(), store.split(&lower).unwrap());
    let fill = |root: &Path| {
        let mut file = fs::File::create(root.join("fill")).unwrap();
        (0..64).try_for_each(|_| file.write_all(&[1; 32 << 10]))
    };
    let refused = fill(&full.path()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::StorageFull);
    fs::write(other.path().join("x"), [1; 1000]).unwrap();
    // The sandbox itself can make room again.
    fs::remove_file(full.path().join("fill")).unwrap();
    fs::write(full.path().join("x"), [1; 1000]).unwrap();
    // A size of its own.
    let large = store.split_sized(&lower, ByteSize::mib(4)).unwrap();
    fill(&large.path()).unwrap();
}

#[test]
fn cycles_leave_no_mount_and_no_descriptor() {
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let cycles = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        10_000
    } else {
        300
    };
    let dir = scratch::on_disk().unwrap();
    let image = Image::directory(tree(dir.path())).unwrap();
    let guard = LeakGuard::beneath(dir.path());
    let store = RootfsStore::open(&config(&dir.path().join("run"), SHARED)).unwrap();
    let lower = store.lower(&image).unwrap();
    for n in 0..cycles {
        let root = if n % 2 == 0 {
            store.split(&lower).unwrap()
        } else {
            store.split_sized(&lower, ByteSize::mib(1)).unwrap()
        };
        fs::create_dir_all(root.path().join("a/b/c")).unwrap();
        fs::write(root.path().join("a/b/c/d"), "x").unwrap();
    }
    drop((store, lower));
    guard.check();
}

#[test]
fn a_very_deep_writable_layer_is_removed() {
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let dir = scratch::on_disk().unwrap();
    let image = Image::directory(tree(dir.path())).unwrap();
    let store = RootfsStore::open(&config(&dir.path().join("run"), SHARED)).unwrap();
    let root = store.split(&store.lower(&image).unwrap()).unwrap();
    // Deeper than a process may have descriptors.
    let mut below = rustix::fs::open(
        &*root.path(),
        rustix::fs::OFlags::DIRECTORY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    for _ in 0..3000 {
        rustix::fs::mkdirat(&below, "d", 0o755.into()).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY;
        below = rustix::fs::openat(&below, "d", flags, rustix::fs::Mode::empty()).unwrap();
    }
    drop(below);
    drop(root);
    let mounts = fs::read_dir(dir.path().join("run")).unwrap();
    let folder = mounts.flatten().next().unwrap().path();
    assert_eq!(
        fs::read_dir(folder.join("mounts/upper")).unwrap().count(),
        0
    );
}

/// Name, kind, contents or link target.
type Entry<'a> = (&'a str, tar::EntryType, &'a str);

fn tar(path: &Path, entries: &[Entry<'_>]) {
    let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, kind, text) in entries {
        let mut header = tar::Header::new_gnu();
        // By hand: the library refuses to write `..`.
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        let is_link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
        if is_link {
            header.as_gnu_mut().unwrap().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        let body = if is_link { "" } else { text };
        header.set_size(body.len() as u64);
        header.set_cksum();
        builder.append(&header, body.as_bytes()).unwrap();
    }
    builder.finish().unwrap();
}

#[test]
fn layers_that_reach_outside_are_refused() {
    use tar::EntryType::{Block, Char, Directory, Link, Regular, Symlink};

    let dir = scratch::on_disk().unwrap();
    let victim = dir.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let absolute = victim.to_str().unwrap();
    let cases: &[(&str, &[Entry<'_>])] = &[
        ("dots", &[("../victim", Regular, "x")]),
        ("dots inside", &[("a/../../victim", Regular, "x")]),
        (
            "link out",
            &[("l", Symlink, ".."), ("l/victim", Regular, "x")],
        ),
        (
            "link away",
            &[("l", Symlink, "/"), ("l/victim", Regular, "x")],
        ),
        (
            "deep link",
            &[
                ("a", Directory, ""),
                ("a/l", Symlink, "../.."),
                ("a/l/victim", Regular, "x"),
            ],
        ),
        (
            "hard link out",
            &[("h", Link, "../victim"), ("h", Regular, "x")],
        ),
        (
            "hard link by link",
            &[("l", Symlink, ".."), ("h", Link, "l/victim")],
        ),
        ("whiteout out", &[("../.wh.victim", Regular, "")]),
        (
            "whiteout by link",
            &[("l", Symlink, ".."), ("l/.wh.victim", Regular, "")],
        ),
        (
            "whiteout of dots",
            &[("a", Directory, ""), ("a/.wh...", Regular, "")],
        ),
        (
            "directory by link",
            &[("l", Symlink, ".."), ("l/new", Directory, "")],
        ),
        ("device", &[("null", Char, "")]),
        ("disk", &[("sda", Block, "")]),
    ];
    for (n, (what, entries)) in cases.iter().enumerate() {
        let (file, into) = (
            dir.path().join("layer.tar"),
            dir.path().join(format!("{n}")),
        );
        fs::create_dir(&into).unwrap();
        tar(&file, entries);
        let refused = unpack(&[Layer::Tar(file)], &into, &LayerLimits::default());
        let typed = matches!(&refused, Err(Error::Rootfs { why, .. }) if why.contains("refused"));
        assert!(typed, "{what}: {refused:?}");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched", "{what}");
        assert!(!dir.path().join("new").exists(), "{what}");
    }
    // A file at the end of a link is replaced, not written through.
    let (file, into) = (dir.path().join("layer.tar"), dir.path().join("through"));
    fs::create_dir(&into).unwrap();
    tar(&file, &[("l", Symlink, absolute), ("l", Regular, "x")]);
    unpack(&[Layer::Tar(file)], &into, &LayerLimits::default()).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    assert_eq!(fs::read_to_string(into.join("l")).unwrap(), "x");
}

#[test]
fn upper_layers_replace_and_hide_what_lower_ones_have() {
    use tar::EntryType::{Directory, Regular, Symlink};

    let dir = scratch::on_disk().unwrap();
    let (low, high) = (dir.path().join("low.tar"), dir.path().join("high.tar"));
    tar(
        &low,
        &[
            ("./", Directory, ""),
            ("lib", Symlink, "usr/lib"),
            ("usr/lib/a", Regular, "a"),
            ("gone", Regular, "x"),
            ("opaque/x", Regular, "x"),
            ("kept", Regular, "old"),
        ],
    );
    tar(
        &high,
        &[
            ("/lib/b", Regular, "b"),
            (".wh.gone", Regular, ""),
            ("opaque/.wh..wh..opq", Regular, ""),
            ("opaque/y", Regular, "y"),
            ("kept", Regular, "new"),
        ],
    );
    let into = dir.path().join("into");
    fs::create_dir(&into).unwrap();
    unpack(
        &[Layer::Tar(low.clone()), Layer::Tar(high)],
        &into,
        &LayerLimits::default(),
    )
    .unwrap();
    let read = |name: &str| fs::read_to_string(into.join(name)).ok();
    assert_eq!(read("usr/lib/a").as_deref(), Some("a"));
    assert_eq!(read("usr/lib/b").as_deref(), Some("b"));
    assert_eq!(read("kept").as_deref(), Some("new"));
    assert_eq!(read("opaque/y").as_deref(), Some("y"));
    assert_eq!((read("gone"), read("opaque/x")), (None, None));

    // The same in gzip, and cut short.
    let packed = dir.path().join("low.tar.gz");
    let mut encoder = flate2::write::GzEncoder::new(
        fs::File::create(&packed).unwrap(),
        flate2::Compression::fast(),
    );
    encoder.write_all(&fs::read(&low).unwrap()).unwrap();
    encoder.finish().unwrap();
    let into = dir.path().join("again");
    fs::create_dir(&into).unwrap();
    unpack(
        &[Layer::Tar(packed.clone())],
        &into,
        &LayerLimits::default(),
    )
    .unwrap();
    assert!(into.join("usr/lib/a").exists());
    let file = fs::OpenOptions::new().write(true).open(&packed).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let cut = unpack(&[Layer::Tar(packed)], &into, &LayerLimits::default());
    assert!(matches!(cut, Err(Error::Rootfs { .. })));

    // More than the limits allow.
    let few = LayerLimits {
        entries: 3,
        ..LayerLimits::default()
    };
    let refused = unpack(&[Layer::Tar(low)], &into, &few).unwrap_err();
    assert!(refused.to_string().contains("limits"), "{refused}");
}

#[test]
fn bytes_that_are_no_image_are_refused() {
    let dir = scratch::on_disk().unwrap();
    let file = dir.path().join("file");
    for bytes in [&b""[..], b"hsq", &[0xff; 4096]] {
        fs::write(&file, bytes).unwrap();
        assert!(matches!(Image::open(&file), Err(Error::Rootfs { .. })));
    }
    assert!(Image::directory(&file).is_err());
    assert!(Image::open(dir.path().join("nothing")).is_err());
    if !Capability::Root.is_present() || !Capability::TmpfsMount.is_present() {
        return;
    }
    // A superblock of erofs with nothing behind it: the kernel refuses, and so do we.
    let broken = fs::File::create(&file).unwrap();
    broken
        .write_all_at(&0xE0F5_E1E2u32.to_le_bytes(), 1024)
        .unwrap();
    broken.set_len(1 << 20).unwrap();
    let image = Image::open(&file).unwrap();
    let store = RootfsStore::open(&config(&dir.path().join("run"), SHARED)).unwrap();
    let refused = store.lower(&image).unwrap_err();
    assert!(matches!(refused, Error::Rootfs { .. }), "{refused}");
}

#[test]
fn a_copy_on_a_file_system_that_shares_blocks_is_a_reflink() {
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let dir = scratch::on_disk().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let done = std::process::Command::new(program).args(arguments).output();
        done.is_ok_and(|done| done.status.success())
    };
    let (disk, point) = (dir.path().join("disk"), dir.path().join("point"));
    fs::create_dir(&point).unwrap();
    fs::File::create(&disk).unwrap().set_len(512 << 20).unwrap();
    let (disk, at) = (disk.to_str().unwrap(), point.to_str().unwrap());
    if !run("mkfs.xfs", &["-q", disk]) || !run("mount", &["-o", "loop", disk, at]) {
        return;
    }
    let (from, to) = (point.join("from"), point.join("to"));
    fs::write(&from, vec![5; 4 << 20]).unwrap();
    let copied = copy_file(&from, &to);
    let equal = fs::read(&to).ok() == fs::read(&from).ok();
    assert!(
        copy_file(&from, &to).is_err(),
        "an existing file is not overwritten"
    );
    assert!(run("umount", &[at]));
    assert_eq!((copied.unwrap(), equal), (Copied::Reflinked, true));
    // Where it cannot share, it copies.
    let here = dir.path().join("here");
    fs::write(&here, "x").unwrap();
    let tmpfs = scratch::on_tmpfs().unwrap();
    assert_eq!(
        copy_file(&here, &tmpfs.path().join("x")).unwrap(),
        Copied::Bytes
    );
}

#[test]
#[ignore = "a role of `a_store_whose_owner_is_killed_at_any_moment_is_swept`"]
fn role_owner() {
    let Some((run, tree)) = child::arguments::<(PathBuf, PathBuf)>("role_owner") else {
        return;
    };
    let image = Image::directory(tree).unwrap();
    let store = RootfsStore::open(&config(&run, OWN)).unwrap();
    let lower = store.lower(&image).unwrap();
    let roots: Vec<_> = (0..20).map(|_| store.split(&lower).unwrap()).collect();
    child::tell("mounted");
    child::wait_for_parent();
    drop(roots);
}

fn mounts_below(path: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = path.to_str().unwrap();
    mounts.lines().filter(|line| line.contains(path)).count()
}

#[test]
fn a_store_whose_owner_is_killed_at_any_moment_is_swept() {
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let times = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        300
    } else {
        12
    };
    let dir = scratch::on_disk().unwrap();
    let arguments = (dir.path().join("run"), tree(dir.path()));
    let start = || Role::test("role_owner").start(&arguments);
    let mut owner = start().unwrap();
    owner.hear("mounted").unwrap();
    // The control: mounts of a living owner stay.
    sweep(&arguments.0).unwrap();
    assert!(mounts_below(dir.path()) > 20);
    owner.kill();
    assert_eq!(sweep(&arguments.0).unwrap().owners, 1);
    assert_eq!(mounts_below(dir.path()), 0);

    let mut rng = seed::rng("rootfs owner killed");
    kill_at_random(
        &mut rng,
        times,
        Duration::from_millis(40),
        |_| start(),
        |_| {
            sweep(&arguments.0).unwrap();
            assert_eq!(mounts_below(dir.path()), 0);
        },
    )
    .unwrap();
    assert_eq!(fs::read_dir(&arguments.0).unwrap().count(), 0);
}

#[test]
fn without_the_right_to_mount_the_error_says_so() {
    if Capability::Root.is_present() {
        return;
    }
    let dir = scratch::on_disk().unwrap();
    let refused = RootfsStore::open(&config(&dir.path().join("run"), SHARED)).unwrap_err();
    assert!(matches!(refused, Error::Rootfs { .. }), "{refused}");
    assert_eq!(fs::read_dir(dir.path().join("run")).unwrap().count(), 0);
}
