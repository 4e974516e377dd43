//! The guest's side: an initial file system with an init that stops at the point of the snapshot,
//! and what the host tells each clone behind it, over the serial line.

use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use carlsbad_types::ByteSize;

use super::agent;
use crate::error::{Error, Result};

/// What the guest says when it is to be saved.
pub(super) const READY: &[u8] = b"RUND-READY";
/// What it says before the program's output.
pub(super) const BEGIN: &[u8] = b"RUND-BEGIN\n";

/// What a guest says behind its program's output, and before the exit code. It has `nonce` in it:
/// what a program happens to print is not taken for its end.
pub(super) fn end_mark(nonce: u64) -> Vec<u8> {
    format!("\nRUND-END {nonce:016x} ").into_bytes()
}

/// The guest's first process until it can be saved: the agent goes on from there, and says that it
/// is ready. All that differs between clones comes behind that: a name, the time, and entropy,
/// without which every clone would draw the same random numbers.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty raw -echo
split() {
    mkdir -p /rund/lower /rund/volatile /rund/root &&
    mount -t erofs -o ro /dev/vda /rund/lower &&
    mount -t tmpfs volatile /rund/volatile &&
    mkdir /rund/volatile/upper /rund/volatile/work &&
    mount -t overlay root /rund/root -o \
        lowerdir=/rund/lower,upperdir=/rund/volatile/upper,workdir=/rund/volatile/work,volatile &&
    cd /rund/root &&
    mkdir -p dev proc sys tmp &&
    mount --move /dev dev && mount --move /proc proc && mount --move /sys sys
}
case " $(cat /proc/cmdline) " in
    *" rund.split "*)
        split && exec /bin/rund-agent /rund/root
        echo "cannot mount the split root"
        reboot -f ;;
esac
exec /bin/rund-agent
"#;

/// The kernel's argument by which the init knows that the root is split: an erofs image on the first
/// block device, and a layer in memory over it.
pub(super) const SPLIT: &str = "rund.split";

/// The initial file system of a Linux guest in the backend `qemu`: busybox, and an init that waits
/// where a template is saved.
///
/// `busybox` is a static busybox; `files` are more files, by their path inside. The kernel needs
/// its serial console and devtmpfs built in, as Debian's cloud kernel has them; for a split root
/// ([`Qemu`](crate::Qemu)) also virtio-mmio on its command line, virtio-blk, erofs and overlayfs, as
/// the condensed kernel has them.
///
/// # Errors
/// Where a file cannot be read.
pub fn initramfs(busybox: &Path, files: &[(&Path, &Path)]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for name in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.add(name.as_bytes(), 0o040_755, &[]);
    }
    let read = |path: &Path| std::fs::read(path).map_err(Error::io("read", path));
    archive.add(b"bin/busybox", 0o100_755, &read(busybox)?);
    archive.add(b"init", 0o100_755, INIT.as_bytes());
    archive.add(b"bin/rund-agent", 0o100_755, &agent::program()?);
    for (inside, host) in files {
        let name = inside.strip_prefix("/").unwrap_or(inside);
        archive.add(name.as_os_str().as_bytes(), 0o100_755, &read(host)?);
    }
    Ok(archive.finish())
}

/// A `cpio` archive in the format `newc` (Documentation/driver-api/early-userspace/buffer-format).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &[u8], mode: u32, body: &[u8]) {
        self.inode += 1;
        let mut header = String::from("070701");
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(body.len()).unwrap_or(u32::MAX),
            0,
            0,
            0,
            0,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        for field in fields {
            // Into a string nothing fails.
            let _written = write!(header, "{field:08x}");
        }
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(body);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add(b"TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// A program's output as it comes over the serial line.
#[derive(Debug)]
pub(super) struct Transcript {
    seen: Vec<u8>,
    begun: bool,
    /// What comes before the exit code.
    end: Vec<u8>,
    /// No more than so much of it is kept.
    most: usize,
    dropped: bool,
    code: Option<i32>,
}

/// The longest exit code, and a line's end.
const CODE: usize = 4;

impl Transcript {
    pub(super) fn new(most: ByteSize, end: Vec<u8>) -> Self {
        Self {
            seen: Vec::new(),
            begun: false,
            end,
            most: usize::try_from(most.get()).unwrap_or(usize::MAX),
            dropped: false,
            code: None,
        }
    }

    /// Takes what came; whether it was the last that the guest has to say.
    pub(super) fn push(&mut self, bytes: &[u8]) -> bool {
        // What came before is searched again only where a mark may have begun in it.
        let known = self.seen.len().saturating_sub(self.end.len() + CODE);
        self.seen.extend(bytes);
        let mut from = known;
        if !self.begun
            && let Some(at) = find(&self.seen, BEGIN)
        {
            self.seen.drain(..at + BEGIN.len());
            self.begun = true;
            from = 0;
        }
        if !self.begun {
            return false;
        }
        if let Some(at) = find(&self.seen[from..], &self.end)
            && let Some(length) = find(&self.seen[from + at + self.end.len()..], b"\n")
        {
            let at = from + at;
            let code = &self.seen[at + self.end.len()..][..length];
            self.code = std::str::from_utf8(code)
                .ok()
                .and_then(|code| code.trim().parse().ok());
            self.seen.truncate(at);
            return true;
        }
        // The end's mark is in the last few bytes, which are always kept.
        let tail = self.end.len() + CODE;
        if self.seen.len() > self.most.saturating_add(2 * tail) {
            let from = self.seen.len() - tail;
            self.seen.drain(self.most..from);
            self.dropped = true;
        }
        false
    }

    /// The output, the exit code where the guest said one, and whether output was dropped.
    pub(super) fn finish(mut self) -> (Vec<u8>, Option<i32>, bool) {
        if !self.begun {
            self.seen.clear();
        }
        let dropped = self.dropped || self.seen.len() > self.most;
        self.seen.truncate(self.most);
        (self.seen, self.code, dropped)
    }
}

pub(super) fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}

/// Reads the console up to the mark; else what was said instead.
pub(super) fn read_until_ready(mut console: impl Read) -> std::result::Result<(), String> {
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match console.read(&mut chunk) {
            Ok(0) | Err(_) => {
                let text = String::from_utf8_lossy(&seen);
                let last: Vec<_> = text.lines().rev().take(3).collect();
                return Err(format!("its console ended with {last:?}"));
            }
            Ok(n) => seen.extend(&chunk[..n]),
        }
        if find(&seen, READY).is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Archive, Transcript, end_mark};
    use carlsbad_types::ByteSize;

    #[test]
    fn output_is_between_the_marks() {
        let text = b"noise\nRUND-BEGIN\nhello\nRUND-END is said\n\nRUND-END 0000000000000007 003\n";
        // In however many pieces it comes.
        for piece in [1, 2, 7, text.len()] {
            let mut transcript = Transcript::new(ByteSize::kib(1), end_mark(7));
            let pieces: Vec<_> = text.chunks(piece).collect();
            let (last, others) = pieces.split_last().unwrap();
            for piece in others {
                assert!(!transcript.push(piece));
            }
            assert!(transcript.push(last));
            let (output, code, dropped) = transcript.finish();
            assert_eq!(output, b"hello\nRUND-END is said\n");
            assert_eq!((code, dropped), (Some(3), false));
        }
    }

    #[test]
    fn too_much_output_is_dropped_and_the_code_is_not() {
        let mut transcript = Transcript::new(ByteSize::new(4), end_mark(7));
        transcript.push(b"RUND-BEGIN\n");
        for _ in 0..100 {
            transcript.push(b"0123456789");
        }
        assert!(transcript.push(b"\nRUND-END 0000000000000007 000\n"));
        let (output, code, dropped) = transcript.finish();
        assert_eq!((&output[..], code, dropped), (&b"0123"[..], Some(0), true));
    }

    #[test]
    fn archives_are_aligned() {
        let mut archive = Archive::default();
        archive.add(b"a", 0o100_644, b"x");
        let bytes = archive.finish();
        assert!(bytes.len().is_multiple_of(4));
        assert_eq!(&bytes[..6], b"070701");
    }
}
