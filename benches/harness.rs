//! One harness for the micro-benchmarks of all crates: `cargo bench -p weft-CRATE --bench paths`.
//!
//! A path is a hot piece of the crate, set up once and then repeated. Three ways to look at it:
//!
//! ```text
//! cargo bench -p weft-CRATE --bench paths                       time of each path, which a busy machine distorts
//! cargo bench -p weft-CRATE --bench paths -- --instructions     instructions of each path, compared with what is on record
//! cargo bench -p weft-CRATE --bench paths -- --bless            the same, and puts the new counts on record
//! ```
//!
//! Instructions are counted by valgrind's callgrind, in a process of its own for each path, twice with different numbers of
//! repeats: the difference has no set-up in it. They are on record in `benches/instructions.txt` of the crate, and a count
//! that differs by more than [`TOLERANCE`] fails in either direction: what became cheaper is put on record too, or it could
//! be lost again unnoticed.
//!
//! Counts do not depend on the processor, as long as it has AVX2: valgrind shows programs a fixed one with AVX2 and without
//! AVX-512 and GFNI, so that is what the codec, the checksums and the C library choose at run time. They do depend on the
//! toolchain, which is pinned, and a little on the C library. They say nothing of caches, of waiting or of system calls.
//!
//! Shared by path and not a crate, so that no crate depends on another for its measurements.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How far a count may be from the one on record. Hash tables are seeded at random and addresses differ a little; what
/// was seen of that is below 0.1 %.
const TOLERANCE: f64 = 0.03;

/// Repeats whose difference is counted. The first ones fill pools and tables.
const REPEATS: [u64; 2] = [64, 192];

/// A hot piece: what it is called, and what sets it up and answers one repeat of it.
pub(crate) type HotPath = (&'static str, fn() -> Box<dyn FnMut()>);

/// The program of a benchmark.
///
/// `folder` is the crate's, `CARGO_MANIFEST_DIR`.
pub(crate) fn main(folder: &str, paths: &[HotPath]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let record = Path::new(folder).join("benches/instructions.txt");
    match arguments[..] {
        ["--count", name, repeats] => count(paths, name, repeats.parse().expect("a number of repeats")),
        _ if arguments.contains(&"--bless") => compare(paths, &record, true),
        _ if arguments.contains(&"--instructions") => compare(paths, &record, false),
        _ => time(paths),
    }
}

/// Runs a path so many times: what valgrind looks at.
fn count(paths: &[HotPath], name: &str, repeats: u64) -> ExitCode {
    let (_, set_up) = paths
        .iter()
        .find(|(found, _)| *found == name)
        .expect("a path of this benchmark");
    let mut repeat = set_up();
    (0..repeats).for_each(|_| repeat());
    ExitCode::SUCCESS
}

/// Prints the best time of each path over a few runs.
fn time(paths: &[HotPath]) -> ExitCode {
    for (name, set_up) in paths {
        let mut repeat = set_up();
        let mut best = f64::INFINITY;
        for _ in 0..7 {
            let (start, mut repeats) = (Instant::now(), 0u32);
            while start.elapsed() < Duration::from_millis(40) {
                // The clock costs as much as a short path.
                (0..16).for_each(|_| black_box(&mut repeat)());
                repeats += 16;
            }
            best = best.min(start.elapsed().as_nanos() as f64 / f64::from(repeats));
        }
        println!("{name:<48} {best:>12.0} ns");
    }
    ExitCode::SUCCESS
}

fn compare(paths: &[HotPath], record: &Path, bless: bool) -> ExitCode {
    let known = read(record);
    let mut counted = BTreeMap::new();
    let mut failed = false;
    for (name, _) in paths {
        let [fewer, more] = REPEATS.map(|repeats| instructions(name, repeats));
        let each = (more - fewer) / (REPEATS[1] - REPEATS[0]);
        let (verdict, bad) = match known.get(*name) {
            None => ("not on record".to_owned(), true),
            Some(known) => {
                let change = each as f64 / *known as f64 - 1.0;
                let verdict = format!("{known} on record, {:+.2} %", change * 100.0);
                (verdict, change.abs() > TOLERANCE)
            }
        };
        let mark = if bad && !bless { "FAIL" } else { "" };
        println!("{name:<48} {each:>10} instructions, {verdict} {mark}");
        failed |= bad;
        counted.insert((*name).to_owned(), each);
    }
    failed |= counted.len() != known.len();
    if bless {
        write(record, &counted);
        return ExitCode::SUCCESS;
    }
    if failed {
        eprintln!(
            "{} is not what was counted; if that is meant: cargo bench --bench paths -p weft-CRATE -- --bless",
            record.display()
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Instructions of a process that runs a path so many times.
fn instructions(name: &str, repeats: u64) -> u64 {
    let program: PathBuf = std::env::current_exe().expect("this program");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args([OsStr::new("--count"), name.as_ref(), repeats.to_string().as_ref()])
        // What the environment holds moves the stack, and some of it speaks to the C library.
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .output()
        .expect("valgrind, which is a Debian package");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} under valgrind: {text}");
    let line = text.lines().find_map(|line| line.split_once("Collected : "));
    let (_, count) = line.unwrap_or_else(|| panic!("no count of {name}: {text}"));
    count.trim().parse().expect("a count")
}

fn read(record: &Path) -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(record).unwrap_or_default();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (name, count) = line.rsplit_once(": ")?;
            Some((name.to_owned(), count.parse().ok()?))
        })
        .collect()
}

fn write(record: &Path, counted: &BTreeMap<String, u64>) {
    let lines = counted.iter().map(|(name, count)| format!("{name}: {count}\n"));
    let text = format!(
        "# Instructions of each path, by `cargo bench --bench paths -- --bless`; see benches/harness.rs.\n{}",
        lines.collect::<String>()
    );
    std::fs::write(record, text).expect("the record is ours to write");
}
