//! One operation per volume at a time.
//!
//! A second one is told which is at work. When that one's caller has gone, because its deadline passed or its
//! connection broke, the work goes on, and the same request again waits for it instead of starting anew. Work whose
//! caller goes away before it has begun never begins.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};

use super::{Refusal, Rpc};
use crate::error::{Error, Kind};
use crate::values::VolumeId;

/// How many operations that start or stop a ZeroFS run at once: each waits far more than it computes.
const HEAVY: usize = 40;

/// How many others.
const LIGHT: usize = 40;

type Outcome = Result<Arc<dyn Any + Send + Sync>, Refusal>;

struct Flight {
    rpc: Rpc,
    print: Vec<u8>,
    begun: Instant,
    /// Who waits for the outcome.
    callers: AtomicUsize,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// What is at work.
pub struct Flights {
    map: Arc<Mutex<HashMap<VolumeId, Arc<Flight>>>>,
    heavy: Arc<Semaphore>,
    light: Arc<Semaphore>,
}

/// A caller, for as long as it waits.
struct Caller(Arc<Flight>);

impl Drop for Caller {
    fn drop(&mut self) {
        self.0.callers.fetch_sub(1, Ordering::Relaxed);
    }
}

type Map = Mutex<HashMap<VolumeId, Arc<Flight>>>;

fn lock(map: &Map) -> MutexGuard<'_, HashMap<VolumeId, Arc<Flight>>> {
    // Nothing panics while it holds the lock, and half a change is not possible.
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the flight off the list, however it ends.
struct Landing {
    map: Arc<Map>,
    volume: VolumeId,
}

impl Drop for Landing {
    fn drop(&mut self) {
        lock(&self.map).remove(&self.volume);
    }
}

impl Default for Flights {
    fn default() -> Self {
        Self::new()
    }
}

impl Flights {
    /// Nothing at work.
    pub fn new() -> Flights {
        Flights {
            map: Arc::default(),
            heavy: Arc::new(Semaphore::new(HEAVY)),
            light: Arc::new(Semaphore::new(LIGHT)),
        }
    }

    /// How many are at work or wait for their turn.
    pub fn count(&self) -> usize {
        lock(&self.map).len()
    }

    /// Waits until nothing is at work; false when that takes longer.
    pub async fn idle_within(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while self.count() > 0 {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        true
    }

    /// Runs `work` as the only one of its volume, or waits for the same request that is at work already.
    pub async fn fly<T: Clone + Send + Sync + 'static>(
        &self,
        rpc: Rpc,
        volume: &VolumeId,
        print: Vec<u8>,
        work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let (sender, receiver) = watch::channel(None);
        let (flight, begins) = {
            let mut map = lock(&self.map);
            match map.get(volume) {
                Some(at_work)
                    if at_work.rpc == rpc
                        && at_work.print == print
                        && at_work.callers.load(Ordering::Relaxed) == 0 =>
                {
                    at_work.callers.fetch_add(1, Ordering::Relaxed);
                    (at_work.clone(), false)
                }
                Some(at_work) => return Err(busy(volume, rpc, at_work)),
                None => {
                    let begun = Instant::now();
                    let flight = Arc::new(Flight {
                        rpc,
                        print,
                        begun,
                        callers: AtomicUsize::new(1),
                        outcome: receiver,
                    });
                    map.insert(volume.clone(), flight.clone());
                    (flight, true)
                }
            }
        };
        let mut outcome = flight.outcome.clone();
        let _caller = Caller(flight);
        if begins {
            let landing = Landing { map: self.map.clone(), volume: volume.clone() };
            let turns = if rpc.is_heavy() { &self.heavy } else { &self.light };
            // A caller that goes away here takes the flight with it.
            let turn = turns.clone().acquire_owned().await.map_err(|_| Refusal::stopping())?;
            tokio::task::spawn_blocking(move || {
                let result =
                    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(Refusal::panicked()));
                let result = result.map(|value| Arc::new(value) as Arc<dyn Any + Send + Sync>);
                // First off the list: whoever hears the outcome may ask for the next thing at once.
                drop(landing);
                drop(turn);
                let _ = sender.send(Some(result));
            });
        }
        let outcome = outcome.wait_for(Option::is_some).await.map_err(|_| Refusal::panicked())?;
        let value = outcome.clone().unwrap_or_else(|| Err(Refusal::panicked()))?;
        value.downcast_ref::<T>().cloned().ok_or_else(Refusal::panicked)
    }
}

fn busy(volume: &VolumeId, rpc: Rpc, at_work: &Flight) -> Refusal {
    let since = at_work.begun.elapsed().as_secs();
    let message =
        format!("{} has been at work on it for {since} s; {} must wait", at_work.rpc.name(), rpc.name());
    Error::new(Kind::Busy, message).on(volume).hint("try again: it needs no help").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn id(name: &str) -> VolumeId {
        name.parse().unwrap()
    }

    #[test]
    fn a_second_one_is_told_which_is_at_work_and_other_volumes_are_not_held_up() {
        runtime().block_on(async {
            let flights = Arc::new(Flights::new());
            let (go, wait) = mpsc::channel::<()>();
            let first = {
                let flights = flights.clone();
                tokio::spawn(async move {
                    let work = move || Ok(wait.recv().is_ok());
                    flights.fly(Rpc::NodeStageVolume, &id("a"), vec![1], work).await
                })
            };
            while flights.count() == 0 {
                tokio::task::yield_now().await;
            }
            let second = flights.fly(Rpc::NodeUnstageVolume, &id("a"), vec![], || Ok(())).await.unwrap_err();
            assert_eq!(second.code(), tonic::Code::Aborted);
            assert!(second.error().message().contains("NodeStageVolume"), "{}", second.error());
            // The same request, while its first caller still waits: that would be a second answer for one work.
            let same = flights.fly(Rpc::NodeStageVolume, &id("a"), vec![1], || Ok(true)).await.unwrap_err();
            assert_eq!(same.code(), tonic::Code::Aborted);
            assert_eq!(flights.fly(Rpc::NodeStageVolume, &id("b"), vec![1], || Ok(7)).await.unwrap(), 7);
            go.send(()).unwrap();
            assert!(first.await.unwrap().unwrap());
            assert_eq!(flights.count(), 0);
        });
    }

    #[test]
    fn the_retry_of_a_caller_that_went_away_finds_its_work_and_another_request_does_not() {
        runtime().block_on(async {
            let flights = Arc::new(Flights::new());
            let (go, wait) = mpsc::channel::<()>();
            let (began, begun) = mpsc::channel();
            let work = move || {
                began.send(()).unwrap();
                wait.recv().unwrap();
                Ok(42)
            };
            let limit = Duration::from_millis(50);
            let volume = id("a");
            let gone = flights.fly(Rpc::NodeStageVolume, &volume, vec![1], work);
            assert!(tokio::time::timeout(limit, gone).await.is_err());
            begun.recv_timeout(Duration::from_secs(20)).expect("it began");
            let other = flights.fly(Rpc::NodeStageVolume, &volume, vec![2], || Ok(1)).await.unwrap_err();
            assert_eq!(other.code(), tonic::Code::Aborted);
            let retry = {
                let (flights, volume) = (flights.clone(), volume.clone());
                tokio::spawn(async move {
                    flights
                        .fly(Rpc::NodeStageVolume, &volume, vec![1], || -> Result<i32, Refusal> {
                            panic!("the work is repeated")
                        })
                        .await
                })
            };
            tokio::time::sleep(Duration::from_millis(20)).await;
            go.send(()).unwrap();
            assert_eq!(retry.await.unwrap().unwrap(), 42);
        });
    }

    #[test]
    fn what_waits_for_its_turn_is_dropped_with_its_caller() {
        runtime().block_on(async {
            let flights = Arc::new(Flights { heavy: Arc::new(Semaphore::new(1)), ..Flights::new() });
            let (go, wait) = mpsc::channel::<()>();
            let first = {
                let flights = flights.clone();
                tokio::spawn(async move {
                    flights.fly(Rpc::NodeStageVolume, &id("a"), vec![], move || Ok(wait.recv().is_ok())).await
                })
            };
            while flights.count() == 0 {
                tokio::task::yield_now().await;
            }
            let (began, begun) = mpsc::channel();
            let work = move || {
                began.send(()).expect("the test listens");
                Ok(())
            };
            let volume = id("b");
            let second = flights.fly(Rpc::NodeStageVolume, &volume, vec![], work);
            assert!(tokio::time::timeout(Duration::from_millis(50), second).await.is_err());
            assert_eq!(flights.count(), 1, "only the first one is left");
            go.send(()).unwrap();
            assert!(first.await.unwrap().unwrap());
            // Its turn is free again, and the one that was dropped has not begun.
            assert_eq!(flights.fly(Rpc::NodeStageVolume, &id("b"), vec![], || Ok(7)).await.unwrap(), 7);
            assert_eq!(begun.try_recv(), Err(mpsc::TryRecvError::Disconnected));
        });
    }

    #[test]
    fn a_panic_is_an_answer_and_holds_nothing() {
        runtime().block_on(async {
            let flights = Flights::new();
            let work = || -> Result<(), Refusal> { panic!("on purpose") };
            let e = flights.fly(Rpc::CreateVolume, &id("a"), vec![], work).await.unwrap_err();
            assert_eq!(e.code(), tonic::Code::Internal);
            assert!(flights.fly(Rpc::CreateVolume, &id("a"), vec![], || Ok(())).await.is_ok());
        });
    }
}
