//! Runs the conformance cases and a short measurement on a real drive: `drive_check PATH`.
//!
//! Everything on the drive is lost. For raw block devices, which the tests cannot expect to find.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use weft_block::buffer::AlignedBuf;
use weft_block::drive::{Drive, DriveOptions, Engine};
use weft_block::{BlockDevice, Device, Durability, testing};
use weft_proto::units::{Lba, LbaRange};

/// Operations in flight of the measurement.
const DEPTHS: [u64; 2] = [1, 32];

fn main() {
    let Some(path) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: drive_check PATH (everything on it is lost)");
        std::process::exit(2);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    for engine in [Engine::Auto, Engine::Threads] {
        tokio::task::LocalSet::new().block_on(&runtime, check(&path, engine));
    }
}

async fn check(path: &std::path::Path, engine: Engine) {
    let options = DriveOptions {
        engine,
        ..DriveOptions::default()
    };
    let drive = Drive::open(path, options).await.expect("open the drive");
    println!("{engine:?}: {:?}, direct: {}", drive.info(), drive.is_direct());
    // One device for all cases: they take it with whatever the one before left.
    testing::conformance(async || drive.device()).await;
    println!("{engine:?}: conformance holds");
    let device = drive.device();
    for depth in DEPTHS {
        let reads = measure(&device, depth, |device, start, count| {
            let read = device.read(LbaRange { start, count });
            weft_block::Io::running(async move { read.await.map(drop) })
        });
        println!("{engine:?}: 4 KiB reads at depth {depth}: {:.0}/s", reads.await);
        let data = AlignedBuf::zeroed(4096).freeze();
        let writes = measure(&device, depth, move |device, start, _| {
            device.write(start, vec![data.clone()], Durability::Durable)
        });
        println!(
            "{engine:?}: 4 KiB durable writes at depth {depth}: {:.0}/s",
            writes.await
        );
    }
}

/// Operations per second, of 4 KiB at scattered places within the first 64 MiB.
async fn measure(
    device: &Device,
    depth: u64,
    operation: impl Fn(&Device, Lba, u64) -> weft_block::Io<()> + 'static,
) -> f64 {
    // Written first: reading a hole measures nothing.
    let info = device.info();
    let count = 4096 / u64::from(info.block_bytes);
    let area = (64 << 20).min(info.bytes());
    let mebibyte = Bytes::from(vec![1; 1 << 20]);
    for at in (0..area).step_by(1 << 20) {
        let start = Lba(at / u64::from(info.block_bytes));
        let len = (area - at).min(1 << 20) as usize;
        let written = device.write(start, vec![mebibyte.slice(..len)], Durability::Durable);
        written.await.expect("write");
    }
    let operation = Rc::new(operation);
    let started = Instant::now();
    let lanes = (0..depth).map(|lane| {
        let operation = operation.clone();
        async move {
            let mut done = 0u64;
            let mut state = lane + 1;
            while started.elapsed() < Duration::from_secs(2) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let start = Lba((state >> 33) % (area / 4096) * count);
                operation(device, start, count).await.expect("operation");
                done += 1;
            }
            done
        }
    });
    let done: u64 = join_all(lanes).await.into_iter().sum();
    done as f64 / started.elapsed().as_secs_f64()
}
