// Numbers as people read them.

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

/** 3 significant digits in decimal units: 768 B, 1.23 kB, 41.9 MB. */
export function bytes(count) {
  let unit = 0;
  while (count >= 999.5 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(count) : Number(count.toPrecision(3))} ${UNITS[unit]}`;
}

/** 12,345 */
export const count = (number) => Math.round(number).toLocaleString("en");

/** "1 token", "12 tokens" */
export const tokens = (number) => `${count(number)} ${Math.round(number) === 1 ? "token" : "tokens"}`;

/** 8.91 below ten, 89.1 below a hundred, 891 above. */
export function rate(number) {
  if (number === 0) return "0";
  return number >= 99.95 ? count(number) : number.toFixed(number >= 9.995 ? 1 : 2);
}

/** 0.18 s, 12.3 s, 3 min 20 s, 4 h 5 min, 2 d 3 h */
export function duration(seconds) {
  if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor((minutes % 1440) / 60)} h`;
}

/** A share as a percentage that is never a rounded-away 0 or 100. */
export function percent(share) {
  if (share > 0 && share < 0.001) return "under 0.1 %";
  if (share < 0.0995) return `${Number((share * 100).toFixed(1))} %`;
  return `${share < 1 ? Math.min(99, Math.round(share * 100)) : 100} %`;
}
