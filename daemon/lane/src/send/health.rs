//! Watches the health of a lane's connection: whether bytes still reach the other end.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use memlane_protocol::liveness::{Condition, Liveness, TcpInfo};

use crate::socket::{shortest_of, shortest_round_trip, tcp_info};

/// The kernel is asked about the connection this often.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// The health of one connection.
pub(super) struct ConnectionHealth {
    liveness: Liveness,
    begun: Instant,
    looked: Duration,
    round_trip: Duration,
    receiver_limited: Duration,
}

impl ConnectionHealth {
    pub(super) fn new(socket: impl AsFd) -> Self {
        let round_trip = shortest_round_trip(socket).unwrap_or_default();
        let (liveness, looked, receiver_limited) = Default::default();
        Self { liveness, begun: Instant::now(), looked, round_trip, receiver_limited }
    }

    /// Returns the time since the connection was first checked.
    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Returns the shortest recent round trip; zero while it is unknown.
    pub(super) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Returns for how long nothing could be sent because the receiver did not read.
    pub(super) fn receiver_limited(&self) -> Duration {
        self.receiver_limited
    }

    /// Returns the condition of the connection, if it is time to check it again.
    pub(super) fn check(&mut self, socket: impl AsFd) -> Option<Condition> {
        let now = self.now();
        if now - self.looked < CHECK_INTERVAL {
            return None;
        }
        self.looked = now;
        let info = tcp_info(socket)?;
        self.round_trip = shortest_of(&info);
        self.receiver_limited = Duration::from_micros(info.tcpi_rwnd_limited);
        Some(self.liveness.observe(now, &tcp_state(&info)))
    }
}

fn tcp_state(info: &libc::tcp_info) -> TcpInfo {
    TcpInfo {
        since_heard: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        // The other end answers every probe of a window that is closed.
        unanswered: info.tcpi_unacked > 0 || info.tcpi_probes > 1,
        round_trip: Duration::from_micros(info.tcpi_rtt.into()),
        variation: Duration::from_micros(info.tcpi_rttvar.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_kernel_tells_of_connections() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_far, _) = listener.accept().unwrap();
        near.write_all(&[1; 1000]).unwrap();
        let info = tcp_info(&near).unwrap();
        assert!(info.tcpi_bytes_sent >= 1000 && info.tcpi_rtt > 0);
        let mut health = ConnectionHealth::new(&near);
        assert!(health.round_trip() > Duration::ZERO);
        assert_eq!(health.check(&near), None, "it was just looked at");
        std::thread::sleep(CHECK_INTERVAL);
        assert_eq!(health.check(&near), Some(Condition::Well));
        assert!(tcp_info(std::fs::File::open("/dev/null").unwrap()).is_none());
    }
}
