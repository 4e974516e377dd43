//! What a second process of the guest does between a walk and the call that follows it.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::super::account::{Account, Change, Lock, NAME};
use super::{Layers, Place, Upper};

struct Sandbox {
    dir: tempfile::TempDir,
    layers: Layers,
    change: Change,
}

fn open(path: &Path) -> OwnedFd {
    fs::File::open(path).unwrap().into()
}

impl Sandbox {
    /// `lower/d` and an empty upper layer; beside them what no guest may reach.
    fn new(most: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["lower/d", "outside/inner"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("lower/d/low"), "low").unwrap();
        fs::write(dir.path().join("outside/x"), "secret").unwrap();
        symlink("secret", dir.path().join("outside/link")).unwrap();
        let locks: OwnedFd = fs::File::create(dir.path().join("locks")).unwrap().into();
        let account = Account::new().unwrap();
        let upper = Upper {
            base: open(dir.path()),
            name: "upper".into(),
            most,
            account: &account.upper,
            lock: Lock::new(Box::leak(Box::new(locks)), 1),
            directory: None,
        };
        let layers = Layers::new(Some(open(&dir.path().join("lower"))), Some(upper));
        let change = layers.change().unwrap();
        Self {
            dir,
            layers,
            change,
        }
    }

    fn place(&mut self, path: &str) -> Place {
        self.layers.walk(path.as_bytes(), false).unwrap()
    }

    fn make(&mut self, path: &str) -> Result<(), Errno> {
        let place = self.place(path);
        let flags = OFlag::O_WRONLY;
        self.layers
            .open_write(&self.change, &place, flags, Mode::from_bits_truncate(0o600))
            .map(drop)
    }

    /// `/d` of the writable layer becomes a link to what lies beside the layers, or in them.
    fn swap(&self, to: &str) {
        let upper = self.dir.path().join("upper");
        fs::rename(upper.join("d"), upper.join("was")).unwrap();
        symlink(to, upper.join("d")).unwrap();
    }

    fn swap_back(&self) {
        let upper = self.dir.path().join("upper");
        fs::remove_file(upper.join("d")).unwrap();
        fs::rename(upper.join("was"), upper.join("d")).unwrap();
    }
}

#[test]
fn a_directory_that_became_a_link_leads_nowhere() {
    let mut sandbox = Sandbox::new(1 << 20);
    for name in ["x", "gone", "other"] {
        sandbox.make(&format!("/d/{name}")).unwrap();
    }
    let there = sandbox.place("/d/x");
    let gone = sandbox.place("/d/gone");
    let link = {
        let place = sandbox.place("/d/link");
        let Sandbox { layers, change, .. } = &mut sandbox;
        layers.symlink(change, b"mine", &place).unwrap();
        sandbox.place("/d/link")
    };
    let inner = {
        let place = sandbox.place("/d/inner");
        let Sandbox { layers, change, .. } = &mut sandbox;
        let mode = Mode::from_bits_truncate(0o700);
        layers.make_directory(change, &place, mode).unwrap();
        sandbox.place("/d/inner")
    };
    let new = sandbox.place("/d/new");
    let aside = sandbox.place("/aside");
    let mode = Mode::from_bits_truncate(0o700);
    for to in ["../outside", "was"] {
        sandbox.swap(to);
        let dir = sandbox.dir.path().to_owned();
        let outside = dir.join("outside");
        // The control: the path itself leads there.
        assert!(fs::symlink_metadata(dir.join("upper/d/x")).is_ok());
        let Sandbox { layers, change, .. } = &mut sandbox;
        assert!(layers.open_read(&there).is_err());
        assert!(layers.read_link(&link).is_err());
        assert!(layers.list(&inner).is_err());
        assert!(layers.open_changed(change, &there).is_err());
        for (place, flags) in [(&there, OFlag::O_TRUNC), (&new, OFlag::empty())] {
            let flags = flags | OFlag::O_WRONLY;
            assert!(layers.open_write(change, place, flags, mode).is_err());
        }
        assert!(layers.make_directory(change, &new, mode).is_err());
        assert!(layers.symlink(change, b"x", &new).is_err());
        assert!(layers.link(change, &there, &aside).is_err());
        assert!(layers.link(change, &there, &new).is_err());
        assert!(layers.rename(change, &there, &aside).is_err());
        assert!(layers.rename(change, &there, &gone).is_err());
        assert!(layers.remove(change, &there, false).is_err());
        assert!(layers.remove(change, &inner, true).is_err());
        assert_eq!(fs::read(outside.join("x")).unwrap(), b"secret");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 3);
        assert!(!dir.join("upper/aside").exists());
        // Where it is a directory again, all is as it was.
        sandbox.swap_back();
        let mut names: Vec<_> = fs::read_dir(dir.join("upper/d"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["gone", "inner", "link", "other", "x"]);
    }
}

#[test]
fn what_is_counted_is_what_is_there() {
    let mut sandbox = Sandbox::new(10 * NAME + 3);
    let Sandbox { dir, .. } = &sandbox;
    let upper = dir.path().join("upper");
    // A copy of `low`, its directory: two names and three bytes.
    sandbox.make("/d/low").unwrap();
    for i in 0..8 {
        sandbox.make(&format!("/d/{i}")).unwrap();
    }
    assert_eq!(sandbox.make("/d/8"), Err(Errno::ENOSPC));
    let place = sandbox.place("/d/low");
    let Sandbox { layers, change, .. } = &mut sandbox;
    // Hiding takes the place of what is deleted, but there is no room for both.
    assert_eq!(layers.remove(change, &place, false), Err(Errno::ENOSPC));
    let other = sandbox.place("/d/0");
    let Sandbox { layers, change, .. } = &mut sandbox;
    layers.remove(change, &other, false).unwrap();
    layers.remove(change, &place, false).unwrap();
    assert!(upper.join("d/.wh.low").exists());
    sandbox.make("/d/low").unwrap();
    assert_eq!(fs::read(upper.join("d/low")).unwrap(), b"");
    // What another hand took away is noticed when there is no room.
    fs::remove_file(upper.join("d/1")).unwrap();
    sandbox.make("/d/9").unwrap();
    sandbox.make("/d/10").unwrap();
    assert_eq!(sandbox.make("/d/11"), Err(Errno::ENOSPC));
    sandbox.layers.reset().unwrap();
    assert_eq!(fs::metadata(&upper).unwrap().nlink(), 2);
}

#[test]
fn a_layer_without_rights_is_emptied() {
    use std::os::unix::fs::PermissionsExt;
    let mut sandbox = Sandbox::new(1 << 20);
    sandbox.make("/d/x").unwrap();
    let upper = sandbox.dir.path().join("upper");
    for path in [upper.join("d"), upper.clone()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o0)).unwrap();
    }
    sandbox.layers.delete();
    assert!(!upper.exists());
}

#[test]
fn directories_deeper_than_a_path_is_long_are_deleted() {
    let dir = tempfile::tempdir().unwrap();
    // Each holds all that was made before.
    for i in 0..5000 {
        let new = dir.path().join("new");
        fs::create_dir(&new).unwrap();
        if i > 0 {
            fs::rename(dir.path().join("d"), new.join("d")).unwrap();
        }
        fs::rename(new, dir.path().join("d")).unwrap();
    }
    fs::write(dir.path().join("d/file"), "").unwrap();
    let top = open(dir.path());
    let removed = super::remove_contents(std::os::fd::AsFd::as_fd(&top), Path::new("."));
    assert_eq!(removed, Ok(5001));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
