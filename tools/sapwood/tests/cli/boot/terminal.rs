//! `sapwood boot` on a terminal.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use super::guests::{POWER_OFF, Then};
use super::{LIMIT, Lab, has_kvm, wait_until};

/// A terminal, and `sapwood boot` on it.
struct Session {
    user: File,
    terminal: File,
    child: Child,
    before: Termios,
}

impl Session {
    fn start(lab: &Lab, arguments: &str) -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&user).expect("a terminal");
        unlockpt(&user).expect("a terminal");
        let name = ptsname(&user, Vec::new()).expect("a terminal").into_string().expect("a terminal");
        let terminal = OpenOptions::new().read(true).write(true).open(name).expect("it can be read");
        let before = tcgetattr(&terminal).expect("a terminal");
        let stdio = || Stdio::from(terminal.try_clone().expect("a terminal"));
        let child =
            lab.command(arguments).stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().expect("it starts");
        Self { user: user.into(), terminal, child, before }
    }

    /// Reads what appears until it contains `text`.
    #[track_caller]
    fn shows(&mut self, text: &str) -> String {
        let (deadline, mut shown) = (Instant::now() + LIMIT, Vec::new());
        while !String::from_utf8_lossy(&shown).contains(text) {
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            let mut fds = [PollFd::new(&self.user, PollFlags::IN)];
            if poll(&mut fds, Some(&second)).expect("it can be waited for") > 0 {
                let mut buffer = [0; 256];
                let n = self.user.read(&mut buffer).expect("it can be read");
                shown.extend(&buffer[..n]);
            }
            assert!(Instant::now() < deadline, "{:?}", String::from_utf8_lossy(&shown));
        }
        String::from_utf8(shown).expect("text")
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal)
            .expect("a terminal")
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits for the end: the exit code, and the terminal as it was.
    #[track_caller]
    fn ends(&mut self, code: i32) {
        let mut status = None;
        wait_until("sapwood boot ends", || {
            status = self.child.try_wait().expect("its status");
            status.is_some()
        });
        assert_eq!(status.expect("it has ended").code(), Some(code));
        let after = tcgetattr(&self.terminal).expect("a terminal");
        let modes = |t: &Termios| (t.input_modes, t.output_modes, t.control_modes, t.local_modes);
        assert_eq!(modes(&after), modes(&self.before));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn keys_reach_the_guest_and_the_escape_ends_it() {
    if !has_kvm("keys_reach_the_guest_and_the_escape_ends_it") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Echo);
    let mut session = Session::start(&lab, "disk.layer");
    let shown = session.shows("hello\r\n");
    assert_eq!(shown.matches("Ctrl-A X").count(), 1, "{shown}");
    assert!(session.is_raw());
    // Ctrl-C and Ctrl-Z are the guest's, and so is a doubled Ctrl-A.
    session.user.write_all(b"a\x03\x1a\x01\x01b").unwrap();
    assert_eq!(session.shows("b"), "a\x03\x1a\x01b");
    session.user.write_all(b"\x01x").unwrap();
    session.ends(130);
    lab.is_clean();
}

#[test]
fn the_terminal_is_restored_whatever_happens() {
    if !has_kvm("the_terminal_is_restored_whatever_happens") {
        return;
    }
    let lab = Lab::new("hello\n", POWER_OFF);
    let mut session = Session::start(&lab, "disk.layer");
    session.shows("hello\r\n");
    session.ends(0);
    // No server: it never was raw, or only for a moment.
    Session::start(&lab, "missing.layer").ends(1);
    let lab = Lab::new("hello\n", Then::Halt);
    for (arguments, code) in [("--timeout 2", 124), ("", 130)] {
        let mut session = Session::start(&lab, &format!("disk.layer {arguments}"));
        session.shows("hello\r\n");
        assert!(session.is_raw());
        if code == 130 {
            kill_process(Pid::from_child(&session.child), Signal::TERM).unwrap();
        }
        session.ends(code);
    }
    // Its worker is killed.
    let mut session = Session::start(&lab, "disk.layer");
    session.shows("hello\r\n");
    let id = session.child.id().to_string();
    let worker =
        super::processes().into_iter().find(|p| p.parent == id && p.line.contains("boot-worker")).unwrap();
    kill_process(Pid::from_raw(worker.pid).unwrap(), Signal::KILL).unwrap();
    session.ends(1);
    lab.is_clean();
}
