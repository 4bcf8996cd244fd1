//! The daemon's configuration.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use memlane_net::config::MAX_LANES;
use memlaned::config::{Config, ConfigError};

use crate::text::check_complaint;

/// Reads the text of a configuration file.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let file = Path::new("memlaned.toml");
    match Config::parse(file, text) {
        Ok(config) => {
            check(&config);
            assert_eq!(Config::parse(file, text).ok(), Some(config), "a restart finds the same");
        }
        Err(ConfigError::Read { .. }) => unreachable!("no file is read"),
        Err(ConfigError::File(error)) => {
            let complaint = error.to_string();
            let line = complaint.strip_prefix("memlaned.toml:").and_then(|rest| rest.split_once(": "));
            let line = line.and_then(|(line, _)| line.parse().ok());
            let lines = text.lines().count().max(1) + usize::from(text.ends_with('\n'));
            assert!(line.is_some_and(|line: usize| (1..=lines).contains(&line)), "{complaint}");
            check_complaint(&complaint);
        }
    }
}

fn check(config: &Config) {
    for socket in [&config.api_socket, &config.attach_socket] {
        assert!(socket.is_absolute() && socket.as_os_str().len() < 108);
    }
    assert!(config.journal.is_absolute() && config.control.port() != 0 && config.lane_port != 0);
    let mut ports = (HashSet::new(), HashSet::new());
    for port in &config.ports {
        assert!(ports.0.insert(&port.name) && ports.1.insert(port.address), "{port:?} is there twice");
        assert!(!port.address.is_unspecified() && !port.address.is_multicast());
        assert!((1..=MAX_LANES).contains(&u32::from(port.lanes)));
    }
    let mut peers = (HashSet::new(), HashSet::new());
    for peer in &config.peers {
        assert!(peers.0.insert(&peer.name) && peers.1.insert(peer.control), "{peer:?} is there twice");
        assert!(peer.name != config.host && peer.control.port() != 0);
        assert!(peer.ca.as_ref().is_none_or(|ca| ca.is_absolute()));
    }
    let mut networks = HashSet::new();
    assert!(config.networks.iter().all(|network| networks.insert(&network.name)));
    let limits = &config.limits;
    assert!((Duration::from_millis(1)..=Duration::from_secs(60)).contains(&limits.downtime));
    assert!((1..=1000).contains(&limits.max_iterations));
    assert!(limits.max_stun.is_none_or(|percent| percent < 100));
    assert!((Duration::from_millis(100)..=Duration::from_secs(600)).contains(&limits.silence));
    assert!(config.guests.qemu.iter().all(|qemu| qemu.is_absolute()));
}
