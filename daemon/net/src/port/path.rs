//! Some network paths swallow packets above some size without a word, because a switch between the hosts has a smaller MTU
//! than their network cards (RFC 2923, section 2.1). Connections are made on such a path, and then carry nothing.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use memlane_lane::socket::{tcp_info, unacknowledged_bytes};

/// The kernel sends a packet that was lost a few times more within this time.
const PATIENCE: Duration = Duration::from_millis(1500);
const LOOK: Duration = Duration::from_millis(2);

/// Sends one packet that is as large as those of the connection may be, and waits until the other host's kernel takes or
/// refuses it. Returns how many bytes of data it has, if neither happens. It blocks the calling thread.
pub(super) fn swallowed(stream: &mut TcpStream) -> Option<u32> {
    let bytes = tcp_info(&*stream)?.tcpi_snd_mss;
    let until = Instant::now() + PATIENCE;
    // The other host has closed the connection, and may have said so.
    stream.write_all(&vec![0; bytes as usize]).ok()?;
    while Instant::now() < until {
        let came = unacknowledged_bytes(&*stream).is_none_or(|bytes| bytes == 0);
        if came || stream.take_error().is_ok_and(|error| error.is_some()) {
            return None;
        }
        std::thread::sleep(LOOK);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_packet_that_is_taken_or_refused_is_not_swallowed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        assert_eq!(swallowed(&mut stream), None);
        drop(other);
        assert_eq!(swallowed(&mut stream), None);
        assert_eq!(swallowed(&mut stream), None);
    }
}
