//! Decides who may use the API, and for what. The kernel says who calls; the configuration says what they may do.

use super::Caller;

/// Root may do everything on the host, so that nothing can be kept from it here.
const ROOT: u32 = 0;

/// What a caller may do. An operator may do what a viewer may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A viewer may look at the state of the daemon, and at nothing that others pay for.
    Viewer,
    /// An operator may give every order.
    Operator,
}

/// A user or a group of this host, as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    /// The number of the user or the group.
    pub id: PartyId,
    /// What stands in the configuration: `alice`, or `@memlane` for a group.
    pub name: String,
}

/// The number of a user or a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartyId {
    /// A user.
    User(u32),
    /// A group.
    Group(u32),
}

/// Who may use the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// The user that the daemon runs as. What a viewer must not do, this user can do without the API.
    pub own_user: u32,
    /// The group that the daemon runs as, which is that of its socket.
    pub own_group: u32,
    /// The parties that may order, besides root and the daemon's own user.
    pub operators: Vec<Party>,
    /// The parties that may look, besides those that may order.
    pub viewers: Vec<Party>,
}

impl Access {
    /// Makes an access for root and for the user of this process alone, in whose group the socket is.
    pub fn of_this_process() -> Self {
        let (own_user, own_group) =
            (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { own_user, own_group, operators: Vec::new(), viewers: Vec::new() }
    }

    /// Decides what a caller may do; `None` means nothing at all.
    pub fn role(&self, caller: &Caller) -> Option<Role> {
        let user = caller.uid?;
        let is_one = |parties: &[Party]| {
            parties.iter().any(|party| match party.id {
                PartyId::User(id) => id == user,
                PartyId::Group(id) => caller.groups.contains(&id),
            })
        };
        if user == ROOT || user == self.own_user || is_one(&self.operators) {
            return Some(Role::Operator);
        }
        is_one(&self.viewers).then_some(Role::Viewer)
    }

    /// Returns the mode of the socket. If only its owner and its group may use the API, the kernel already keeps all others
    /// away from it.
    pub fn socket_mode(&self) -> u32 {
        let reaches = |party: &Party| match party.id {
            PartyId::User(id) => id == ROOT || id == self.own_user,
            PartyId::Group(id) => id == self.own_group,
        };
        if self.operators.iter().chain(&self.viewers).all(reaches) { 0o660 } else { 0o666 }
    }

    /// Tells a caller who may not do something who may, and where that is said.
    pub fn who_may(&self, role: Role) -> String {
        let parties: Vec<&Party> = match role {
            Role::Operator => self.operators.iter().collect(),
            Role::Viewer => self.operators.iter().chain(&self.viewers).collect(),
        };
        let names: Vec<&str> = parties.iter().map(|party| party.name.as_str()).collect();
        let (what, list) = match role {
            Role::Operator => ("give orders", "api.operators"),
            Role::Viewer => ("look", "api.operators and api.viewers"),
        };
        let others = if names.is_empty() { String::new() } else { format!(", {}", names.join(", ")) };
        format!(
            "those who may {what}: root, the daemon's user{others} ({list} in the configuration; @ marks a group, which \
             counts from the next login on)"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 990;

    fn party(id: PartyId, name: &str) -> Party {
        Party { id, name: name.to_owned() }
    }

    fn access(operators: &[PartyId], viewers: &[PartyId]) -> Access {
        let named = |ids: &[PartyId]| ids.iter().map(|id| party(*id, "x")).collect();
        Access { own_user: OWN, own_group: OWN, operators: named(operators), viewers: named(viewers) }
    }

    fn caller(uid: u32, groups: &[u32]) -> Caller {
        Caller { uid: Some(uid), groups: groups.to_vec(), ..Caller::default() }
    }

    #[test]
    fn users_and_groups_have_the_roles_that_are_configured() {
        use PartyId::{Group, User};
        let access = access(&[Group(OWN), User(1000)], &[Group(2000), User(3000)]);
        for (uid, groups, role) in [
            (0, &[][..], Some(Role::Operator)),
            (OWN, &[], Some(Role::Operator)),
            (1000, &[1000], Some(Role::Operator)),
            (1001, &[1001, OWN], Some(Role::Operator)),
            (1001, &[1001, 2000], Some(Role::Viewer)),
            (3000, &[], Some(Role::Viewer)),
            // Who has both may order.
            (3000, &[2000, OWN], Some(Role::Operator)),
            // Numbers of users are none of groups.
            (2000, &[1000, 3000, 0], None),
            (1001, &[1001], None),
            (1001, &[], None),
            (u32::MAX, &[u32::MAX], None),
        ] {
            assert_eq!(access.role(&caller(uid, groups)), role, "{uid} {groups:?}");
        }
        // The kernel does not say who it is.
        assert_eq!(access.role(&Caller { groups: vec![OWN], ..Caller::default() }), None);
    }

    #[test]
    fn nobody_orders_by_an_empty_list_but_root_and_the_daemon() {
        let access = access(&[], &[]);
        assert_eq!(access.role(&caller(0, &[])), Some(Role::Operator));
        assert_eq!(access.role(&caller(OWN, &[])), Some(Role::Operator));
        assert_eq!(access.role(&caller(1000, &[OWN])), None);
    }

    #[test]
    fn the_socket_is_open_to_others_only_if_others_are_named() {
        use PartyId::{Group, User};
        for (operators, viewers, mode) in [
            (&[Group(OWN)][..], &[][..], 0o660),
            (&[], &[], 0o660),
            (&[User(0), User(OWN)], &[Group(OWN)], 0o660),
            (&[User(1000)], &[], 0o666),
            (&[Group(OWN)], &[Group(2000)], 0o666),
            (&[Group(0)], &[], 0o666),
        ] {
            assert_eq!(access(operators, viewers).socket_mode(), mode, "{operators:?} {viewers:?}");
        }
    }

    #[test]
    fn a_refusal_says_who_may() {
        let operators = vec![party(PartyId::Group(OWN), "@memlane"), party(PartyId::User(1000), "alice")];
        let viewers = vec![party(PartyId::Group(2000), "@memlane-viewers")];
        let access = Access { own_user: OWN, own_group: OWN, operators, viewers };
        let orders = access.who_may(Role::Operator);
        assert!(
            orders.contains("may give orders: root, the daemon's user, @memlane, alice (api.operators"),
            "{orders}"
        );
        assert!(!orders.contains("viewers"), "{orders}");
        let looks = access.who_may(Role::Viewer);
        assert!(
            looks.contains("@memlane, alice, @memlane-viewers (api.operators and api.viewers"),
            "{looks}"
        );
    }
}
