//! Packets with descriptors over a Unix socket of type SOCK_SEQPACKET.
//!
//! Packets are kept apart by the kernel, so no peer can stop in the middle of one.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use nix::sys::time::TimeVal;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::wire::{MARK, MAX_PACKET};

/// Bytes of control data: SCM_MAX_FD descriptors, which is the most that one packet can have, and
/// the header. With less the kernel would have to leave some out.
const CONTROL: usize = 253 * size_of::<libc::c_int>() + 64;

/// What a message of the other end was.
#[derive(Debug)]
pub(super) enum Received<T> {
    /// A message and the descriptors that came with it.
    Message(T, Vec<OwnedFd>),
    /// Bytes that are no message. They are dropped, and descriptors that came along are closed.
    Garbage(String),
    /// Nothing came in time.
    Silence,
    /// The other end has hung up.
    HungUp,
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    pub(super) const fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// How long a [`Channel::receive`] and a [`Channel::send`] wait at most.
    pub(super) fn set_deadlines(&self, receive: Duration, send: Duration) -> io::Result<()> {
        // Zero would be for ever.
        let of = |time: Duration| {
            let time = time.max(Duration::from_millis(1));
            TimeVal::new(time.as_secs() as i64, i64::from(time.subsec_micros()))
        };
        setsockopt(&self.0, sockopt::ReceiveTimeout, &of(receive))?;
        setsockopt(&self.0, sockopt::SendTimeout, &of(send))?;
        Ok(())
    }

    /// Sends a message and copies of `files`. False where `wait` is not wanted and there is no room.
    pub(super) fn send(
        &self,
        message: &impl Serialize,
        files: &[BorrowedFd<'_>],
        wait: bool,
    ) -> io::Result<bool> {
        let mut packet = MARK.to_vec();
        serde_json::to_writer(&mut packet, message)?;
        if packet.len() > MAX_PACKET {
            let why = "a message longer than a packet may be";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let raw: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights };
        let mut flags = MsgFlags::MSG_NOSIGNAL;
        if !wait {
            flags |= MsgFlags::MSG_DONTWAIT;
        }
        let packet = [IoSlice::new(&packet)];
        loop {
            return match sendmsg::<()>(self.0.as_raw_fd(), &packet, control, flags, None) {
                Ok(_) => Ok(true),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) if !wait => Ok(false),
                Err(Errno::EAGAIN) => Err(io::ErrorKind::TimedOut.into()),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Waits for a message.
    pub(super) fn receive<T: DeserializeOwned>(&self) -> io::Result<Received<T>> {
        let mut packet = vec![0; MAX_PACKET];
        let (len, cut, files) = match self.receive_raw(&mut packet) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Received::Silence);
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Ok(Received::HungUp);
            }
            Err(error) => return Err(error),
        };
        // An empty packet is no message, and the end looks the same.
        if len == 0 {
            return Ok(Received::HungUp);
        }
        if cut {
            let why = "longer than a packet may be, or with descriptors there is no room for";
            return Ok(Received::Garbage(why.to_owned()));
        }
        let Some(json) = packet[..len].strip_prefix(MARK) else {
            let why = "not of this version of the protocol";
            return Ok(Received::Garbage(why.to_owned()));
        };
        Ok(match serde_json::from_slice(json) {
            Ok(message) => Received::Message(message, files),
            Err(error) => Received::Garbage(error.to_string()),
        })
    }

    /// One packet: its length, whether anything of it was cut off, and its descriptors. All that
    /// the kernel has put into this process is owned by what is returned, also in the last case:
    /// nix gives up there without naming them, and a peer could exhaust our descriptors.
    fn receive_raw(&self, packet: &mut [u8]) -> io::Result<(usize, bool, Vec<OwnedFd>)> {
        // u64: aligned as a control header must be.
        let mut control = [0u64; CONTROL.div_ceil(8)];
        let mut part = libc::iovec {
            iov_base: packet.as_mut_ptr().cast(),
            iov_len: packet.len(),
        };
        // SAFETY: all-zero is a valid msghdr: no name, no parts, no control data.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control) as _;
        let len = loop {
            // SAFETY: the header points to a part and to control data that are both writable for
            // the lengths it gives, and outlive the call.
            let len = unsafe {
                libc::recvmsg(self.0.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC)
            };
            match Errno::result(len) {
                Ok(len) => break len as usize,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut files = Vec::new();
        // SAFETY: the kernel has filled in the header and the control data it points to.
        let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a header within the control data.
        while let Some(control) = unsafe { next.as_ref() } {
            if (control.cmsg_level, control.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                // SAFETY: `next` points to a control header, whose data follows it.
                let data: *const libc::c_int = unsafe { libc::CMSG_DATA(next) }.cast();
                // SAFETY: computes a constant.
                let head = unsafe { libc::CMSG_LEN(0) };
                #[allow(clippy::unnecessary_cast, reason = "musl has it as a 32-bit number")]
                let len = control.cmsg_len as usize - head as usize;
                for i in 0..len / size_of::<libc::c_int>() {
                    // SAFETY: the control message has that many descriptors behind its header.
                    let raw = unsafe { data.add(i) };
                    // SAFETY: it points to the i-th of them, aligned or not.
                    let raw = unsafe { raw.read_unaligned() };
                    // SAFETY: the kernel has just made this descriptor for us, and nobody else
                    // knows of it.
                    files.push(unsafe { OwnedFd::from_raw_fd(raw) });
                }
            }
            // SAFETY: both point into what the kernel has filled in.
            next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
        }
        let cut = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
        Ok((len, cut, files))
    }
}

/// A memfd with these bytes that nobody can change any more.
pub(super) fn sealed(name: &str, bytes: &[u8]) -> io::Result<File> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let memfd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(memfd);
    file.write_all(bytes)?;
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let kind = SockType::SeqPacket;
        let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let ends = (Channel::new(a), Channel::new(b));
        ends.0
            .set_deadlines(Duration::from_millis(50), Duration::from_millis(50))
            .unwrap();
        ends
    }

    fn open_files() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn messages_and_descriptors_arrive_and_ends_are_told_apart() {
        let (a, b) = pair();
        let file = sealed("test", b"seven").unwrap();
        assert!(
            b.send(&"hello", &[file.as_fd(), file.as_fd()], true)
                .unwrap()
        );
        match a.receive::<String>().unwrap() {
            Received::Message(text, files) => {
                assert_eq!((text.as_str(), files.len()), ("hello", 2));
                let mut bytes = [0; 5];
                let file = File::from(files.into_iter().next().unwrap());
                file.read_exact_at(&mut bytes, 0).unwrap();
                assert_eq!(&bytes, b"seven");
                assert!(file.write_at(b"x", 0).is_err(), "not sealed");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(a.receive::<String>().unwrap(), Received::Silence));
        drop(b);
        assert!(matches!(a.receive::<String>().unwrap(), Received::HungUp));
    }

    #[test]
    fn garbage_is_named_and_its_descriptors_are_closed() {
        let (a, b) = pair();
        let file = sealed("test", b"").unwrap();
        let raw = vec![file.as_raw_fd(); 253];
        let rights = [ControlMessage::ScmRights(&raw)];
        let before = open_files();
        for garbage in [
            &b"x"[..],
            b"tetris1\n",
            b"tetris1\n{\"a\":[[[",
            b"tetris0\n\"hello\"",
        ] {
            let parts = [IoSlice::new(garbage)];
            sendmsg::<()>(b.0.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
            let received = a.receive::<String>().unwrap();
            assert!(matches!(received, Received::Garbage(_)), "{received:?}");
        }
        let long = vec![b'x'; MAX_PACKET + 1];
        let parts = [IoSlice::new(&long)];
        sendmsg::<()>(b.0.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
        let received = a.receive::<String>().unwrap();
        assert!(matches!(received, Received::Garbage(_)), "{received:?}");
        // Other tests open and close files meanwhile, but none of them hundreds.
        assert!(open_files() < before + 200, "descriptors are left open");
    }

    #[test]
    fn a_peer_that_takes_nothing_in_does_not_hold_us_for_ever() {
        let (a, _b) = pair();
        let text = "x".repeat(60_000);
        let stuck = (0..1_000).find_map(|_| a.send(&text, &[], true).err());
        assert_eq!(stuck.unwrap().kind(), io::ErrorKind::TimedOut);
        assert!(!a.send(&text, &[], false).unwrap());
    }
}
