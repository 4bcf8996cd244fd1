//! This module chooses the congestion control of connections that pages are sent over.
//!
//! BBR paces: it sets a timer for every few packets. On a long path that keeps queues short and a lossy path full, but
//! where a round trip takes microseconds the timers alone take as much processor time as all the rest of sending does.
//! So where a host has BBR as its default, connections over short paths get what Linux has by itself, which sends as
//! soon as the window lets it.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use memlane_lane::socket::tcp_info;
use socket2::SockRef;

/// Pacing pays from this round trip on.
const LONG: Duration = Duration::from_millis(2);
/// These do not pace, and the better one comes first. Every Linux has the second, and allows it to every program.
const UNPACED: [&str; 2] = ["cubic", "reno"];

/// The congestion control of one connection, which may depend on how long its path turns out to be.
pub struct Congestion {
    /// This is the host's default, if it paces and was put off until the round trip is known.
    paced: Option<Vec<u8>>,
}

impl Congestion {
    /// Chooses for a socket that has not begun to connect: what is `configured`, or else what suits the path.
    ///
    /// # Errors
    ///
    /// Fails if this host does not have what is configured, or does not allow it.
    pub fn choose(socket: impl AsFd, configured: Option<&str>) -> io::Result<Self> {
        let socket = SockRef::from(&socket);
        if let Some(name) = configured {
            socket.set_tcp_congestion(name.as_bytes())?;
            return Ok(Self { paced: None });
        }
        // What cannot be asked or changed stays as it is, and is only slower.
        let own = socket.tcp_congestion().unwrap_or_default();
        // Now or never: a connection that has ever paced goes on with it.
        let put_off = own.starts_with(b"bbr")
            && UNPACED.iter().any(|name| socket.set_tcp_congestion(name.as_bytes()).is_ok());
        Ok(Self { paced: put_off.then_some(own) })
    }

    /// Gives a connected socket the host's default back if the path is long.
    pub fn settle(self, socket: impl AsFd) {
        let Some(paced) = self.paced else { return };
        let measured = |micros: &u32| *micros != u32::MAX;
        let round_trip = tcp_info(&socket).map(|info| info.tcpi_min_rtt).filter(measured);
        let long = round_trip.is_some_and(|micros| u128::from(micros) >= LONG.as_micros());
        if long {
            // It was there a moment ago, and is the default, which is allowed to all.
            let _ = SockRef::from(&socket).set_tcp_congestion(&paced);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use socket2::{Domain, Socket, Type};

    use super::*;

    fn socket() -> Socket {
        Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()
    }

    fn of(socket: impl AsFd) -> String {
        let name = SockRef::from(&socket).tcp_congestion().unwrap();
        String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()
    }

    #[test]
    fn what_is_configured_is_used_or_refused() {
        let socket = socket();
        Congestion::choose(&socket, Some("reno")).unwrap();
        assert_eq!(of(&socket), "reno");
        let error = Congestion::choose(&socket, Some("no-such")).err().expect("there is none of this name");
        assert!(matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EPERM)), "{error}");
    }

    #[test]
    fn what_does_not_pace_stays() {
        let socket = socket();
        socket.set_tcp_congestion(b"reno").unwrap();
        assert!(Congestion::choose(&socket, None).unwrap().paced.is_none());
        assert_eq!(of(&socket), "reno");
    }

    #[test]
    fn a_short_way_is_not_paced() {
        let socket = socket();
        if socket.set_tcp_congestion(b"bbr").is_err() {
            println!("SKIPPED: this host has no BBR");
            return;
        }
        let congestion = Congestion::choose(&socket, None).unwrap();
        assert!(congestion.paced.is_some());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        socket.connect(&listener.local_addr().unwrap().into()).unwrap();
        congestion.settle(&socket);
        assert!(UNPACED.contains(&of(&socket).as_str()));
    }
}
