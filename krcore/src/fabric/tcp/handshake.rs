//! How two fabrics come to know that they share a key, and get one for the link: a greeting in
//! clear (what protocol, which version), then Noise NNpsk0: one message each way, a fresh key
//! exchange (X25519) mixed with the shared key. Who does not hold the shared key learns nothing and
//! costs one failed decryption; the messages are short, and no more than that is ever buffered.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use snow::{Builder, HandshakeState, StatelessTransportState};

use super::key::PresharedKey;
use super::peer::LinkError;

const MAGIC: [u8; 4] = *b"KRTC";
/// Of the greeting, the handshake and the frames.
pub(super) const VERSION: u16 = 1;
const GREETING: usize = 8;
/// A key of 32 bytes and a tag of 16.
const NOISE: usize = 48;
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
const OK: u16 = 0;
const WRONG_KEY: u16 = 1;

fn greeting(version: u16, verdict: u16) -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&version.to_le_bytes());
    bytes[6..].copy_from_slice(&verdict.to_le_bytes());
    bytes
}

/// What a greeting says: the version, and what the other side thinks of what it got.
fn read_greeting(bytes: &[u8; GREETING]) -> Result<u16, LinkError> {
    let [m0, m1, m2, m3, v0, v1, w0, w1] = *bytes;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(LinkError::Garbled);
    }
    let theirs = u16::from_le_bytes([v0, v1]);
    if theirs != VERSION {
        return Err(LinkError::Version {
            ours: VERSION,
            theirs,
        });
    }
    Ok(u16::from_le_bytes([w0, w1]))
}

fn builder(key: &PresharedKey) -> Result<Builder<'_>, LinkError> {
    let broken = |_| LinkError::Cipher;
    let builder = Builder::new(PATTERN.parse().map_err(broken)?);
    let builder = builder.prologue(b"krcore tcp 1").map_err(broken)?;
    builder.psk(0, key.bytes()).map_err(broken)
}

/// How far a handshake is.
pub(super) enum Progress {
    /// The other side has not said enough yet.
    Wait,
    /// Both hold the shared key; these are the link's own.
    Done(Arc<StatelessTransportState>),
}

/// A handshake, on either side.
pub(super) struct Handshake {
    noise: Option<HandshakeState>,
    dials: bool,
    held: [u8; GREETING + NOISE],
    length: usize,
}

impl Handshake {
    /// The side that dials speaks first, when the connection is there.
    pub(super) fn dial(key: &PresharedKey, stream: &TcpStream) -> Result<Self, LinkError> {
        let mut noise = builder(key)?
            .build_initiator()
            .map_err(|_| LinkError::Cipher)?;
        let mut first = [0; GREETING + NOISE];
        first[..GREETING].copy_from_slice(&greeting(VERSION, OK));
        noise
            .write_message(&[], &mut first[GREETING..])
            .map_err(|_| LinkError::Cipher)?;
        say(stream, &first)?;
        Ok(Self::with(noise, true))
    }

    pub(super) fn accept(key: &PresharedKey) -> Result<Self, LinkError> {
        let noise = builder(key)?
            .build_responder()
            .map_err(|_| LinkError::Cipher)?;
        Ok(Self::with(noise, false))
    }

    fn with(noise: HandshakeState, dials: bool) -> Self {
        Self {
            noise: Some(noise),
            dials,
            held: [0; GREETING + NOISE],
            length: 0,
        }
    }

    /// Takes what has come.
    pub(super) fn go_on(&mut self, mut stream: &TcpStream) -> Result<Progress, LinkError> {
        while self.length < self.held.len() {
            match stream.read(&mut self.held[self.length..]) {
                Ok(0) => return Err(self.judge().err().unwrap_or(LinkError::Closed)),
                Ok(read) => self.length += read,
                Err(why) if why.kind() == ErrorKind::Interrupted => {}
                Err(why) if why.kind() == ErrorKind::WouldBlock => {
                    return self.judge().map(|()| Progress::Wait);
                }
                Err(_) => return Err(self.judge().err().unwrap_or(LinkError::Closed)),
            }
            self.judge().inspect_err(|why| {
                if !self.dials && matches!(why, LinkError::Version { .. }) {
                    let _gone = say(stream, &greeting(VERSION, OK));
                }
            })?;
        }
        let Some(mut noise) = self.noise.take() else {
            return Err(LinkError::Cipher);
        };
        if noise
            .read_message(&self.held[GREETING..], &mut [0; NOISE])
            .is_err()
        {
            if !self.dials {
                let _gone = say(stream, &greeting(VERSION, WRONG_KEY));
            }
            return Err(LinkError::WrongKey);
        }
        if !self.dials {
            let mut second = [0; GREETING + NOISE];
            second[..GREETING].copy_from_slice(&greeting(VERSION, OK));
            noise
                .write_message(&[], &mut second[GREETING..])
                .map_err(|_| LinkError::Cipher)?;
            say(stream, &second)?;
        }
        let cipher = noise
            .into_stateless_transport_mode()
            .map_err(|_| LinkError::Cipher)?;
        Ok(Progress::Done(Arc::new(cipher)))
    }

    /// Looks at the greeting as soon as it is there.
    fn judge(&self) -> Result<(), LinkError> {
        let begun = self.length.min(MAGIC.len());
        if self.held[..begun] != MAGIC[..begun] {
            return Err(LinkError::Garbled);
        }
        match self.held.first_chunk::<GREETING>() {
            Some(greeting) if self.length >= GREETING => match read_greeting(greeting)? {
                WRONG_KEY if self.dials => Err(LinkError::WrongKey),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

/// A fresh connection takes so few bytes at once.
fn say(mut stream: &TcpStream, bytes: &[u8]) -> Result<(), LinkError> {
    match stream.write(bytes) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        _ => Err(LinkError::Closed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn streams() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        dialled.set_nonblocking(true).unwrap();
        accepted.set_nonblocking(true).unwrap();
        (dialled, accepted)
    }

    fn finish(hands: &mut Handshake, stream: &TcpStream) -> Result<Progress, LinkError> {
        for _ in 0..2000 {
            match hands.go_on(stream) {
                Ok(Progress::Wait) => std::thread::sleep(std::time::Duration::from_millis(1)),
                other => return other,
            }
        }
        panic!("no answer");
    }

    #[test]
    fn who_shares_a_key_comes_to_share_another() {
        let key = PresharedKey::new([7; 32]);
        let (near, far) = streams();
        let mut dials = Handshake::dial(&key, &near).unwrap();
        let mut accepts = Handshake::accept(&key).unwrap();
        let Progress::Done(theirs) = finish(&mut accepts, &far).unwrap() else {
            panic!("it waits");
        };
        let Progress::Done(ours) = finish(&mut dials, &near).unwrap() else {
            panic!("it waits");
        };
        let (mut sealed, mut plain) = ([0; 64], [0; 64]);
        let length = ours.write_message(0, b"hello", &mut sealed).unwrap();
        let length = theirs
            .read_message(0, &sealed[..length], &mut plain)
            .unwrap();
        assert_eq!(&plain[..length], b"hello");
    }

    #[test]
    fn another_key_is_refused_and_both_sides_know() {
        let (near, far) = streams();
        let mut dials = Handshake::dial(&PresharedKey::new([7; 32]), &near).unwrap();
        let mut accepts = Handshake::accept(&PresharedKey::new([8; 32])).unwrap();
        assert_eq!(finish(&mut accepts, &far).err(), Some(LinkError::WrongKey));
        assert_eq!(finish(&mut dials, &near).err(), Some(LinkError::WrongKey));
    }

    #[test]
    fn another_version_is_refused_and_both_sides_know() {
        let (near, far) = streams();
        let mut accepts = Handshake::accept(&PresharedKey::new([7; 32])).unwrap();
        (&near).write_all(&greeting(9, OK)).unwrap();
        let said = LinkError::Version { ours: 1, theirs: 9 };
        assert_eq!(finish(&mut accepts, &far).err(), Some(said));
        let mut answer = [0; GREETING];
        near.set_nonblocking(false).unwrap();
        (&near).read_exact(&mut answer).unwrap();
        assert_eq!(answer, greeting(VERSION, OK));

        let (near, far) = streams();
        let mut dials = Handshake::dial(&PresharedKey::new([7; 32]), &near).unwrap();
        (&far).write_all(&greeting(9, OK)).unwrap();
        assert_eq!(finish(&mut dials, &near).err(), Some(said));
    }

    #[test]
    fn anything_else_is_refused_at_its_first_wrong_byte() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..50 {
            let (near, far) = streams();
            let mut accepts = Handshake::accept(&PresharedKey::new([7; 32])).unwrap();
            let mut noise = [0; GREETING + NOISE];
            rng.fill(&mut noise);
            noise[0] = b'G';
            (&near)
                .write_all(&noise[..rng.usize(1..=noise.len())])
                .unwrap();
            assert_eq!(finish(&mut accepts, &far).err(), Some(LinkError::Garbled));
            // The right greeting, and noise in place of the key.
            let (near, far) = streams();
            let mut accepts = Handshake::accept(&PresharedKey::new([7; 32])).unwrap();
            noise[..GREETING].copy_from_slice(&greeting(VERSION, OK));
            (&near).write_all(&noise).unwrap();
            assert_eq!(finish(&mut accepts, &far).err(), Some(LinkError::WrongKey));
        }
    }
}
