//! The users and groups of this host.

use std::fs;

/// The daemon's user.
pub(super) const DAEMON: &str = "memlane";

/// What `/etc/passwd` and `/etc/group` say.
#[derive(Clone, Debug, Default)]
pub(super) struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads the files. One that cannot be read counts as empty.
    pub(super) fn read() -> Self {
        let text = |file| fs::read_to_string(file).unwrap_or_default();
        Self::of(text("/etc/passwd"), text("/etc/group"))
    }

    pub(super) fn of(passwd: impl Into<String>, group: impl Into<String>) -> Self {
        Self { passwd: passwd.into(), group: group.into() }
    }

    /// Finds the number of a user.
    pub(super) fn user(&self, name: &str) -> Option<u32> {
        number(line(&self.passwd, name)?, 2)
    }

    /// Finds the number of a group.
    pub(super) fn group(&self, name: &str) -> Option<u32> {
        number(line(&self.group, name)?, 2)
    }

    /// Finds the name of a user, or else its number in digits.
    pub(super) fn user_name(&self, user: u32) -> String {
        name(&self.passwd, user)
    }

    /// Finds the name of a group, or else its number in digits.
    pub(super) fn group_name(&self, group: u32) -> String {
        name(&self.group, group)
    }

    /// Lists the groups that a user is in: its own, and those that name it.
    pub(super) fn groups_of(&self, user: &str) -> Vec<u32> {
        let own = line(&self.passwd, user).and_then(|line| number(line, 3));
        let names_it = |line: &&str| {
            let members = line.split(':').nth(3).unwrap_or_default();
            members.split(',').any(|member| member.trim() == user)
        };
        let others = self.group.lines().filter(names_it).filter_map(|line| number(line, 2));
        own.into_iter().chain(others).collect()
    }
}

fn line<'a>(file: &'a str, name: &str) -> Option<&'a str> {
    file.lines().find(|line| line.split(':').next() == Some(name))
}

fn number(line: &str, field: usize) -> Option<u32> {
    line.split(':').nth(field)?.parse().ok()
}

fn name(file: &str, id: u32) -> String {
    let found = file.lines().find(|line| number(line, 2) == Some(id));
    found.and_then(|line| line.split(':').next()).map_or_else(|| id.to_string(), str::to_owned)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The accounts of a host on which everything is installed.
    pub(in crate::doctor) fn whole() -> Accounts {
        Accounts::of(
            "root:x:0:0:root:/root:/bin/bash\nmemlane:x:990:991:Memlane daemon:/var/lib/memlane:/usr/sbin/nologin\n\
             libvirt-qemu:x:64055:105:Libvirt Qemu,,,:/var/lib/libvirt:/usr/sbin/nologin\n",
            "root:x:0:\nkvm:x:105:libvirt-qemu\nmemlane:x:991:alice\nmemlane-qemu:x:992:bob, memlane\n\
             memlane-viewers:x:993:\n",
        )
    }

    #[test]
    fn users_groups_and_members_are_found() {
        let accounts = whole();
        assert_eq!((accounts.user("memlane"), accounts.user("mem")), (Some(990), None));
        assert_eq!((accounts.group("kvm"), accounts.group("memlane-q")), (Some(105), None));
        assert_eq!(accounts.groups_of("memlane"), [991, 992]);
        assert!(accounts.groups_of("nobody-here").is_empty());
        assert_eq!((accounts.group_name(105), accounts.group_name(7)), ("kvm".to_owned(), "7".to_owned()));
        assert_eq!(accounts.user_name(990), "memlane");
        assert_eq!(Accounts::of("memlane", "x:").user("memlane"), None);
    }
}
