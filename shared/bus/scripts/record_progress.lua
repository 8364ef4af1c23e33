-- Count the deliveries of an entry from one again if its request has more tokens than at the last delivery.
-- KEYS: stream, record
-- ARGV: consumer group, consumer, entry id, number of tokens
-- requires: entries
-- requires: typed
if owns(ARGV[3]) and is_a('hash', KEYS[2]) and (tonumber(redis.call('HGET', KEYS[2], 'reached') or 0) or 0) < tonumber(ARGV[4]) then
  redis.call('HSET', KEYS[2], 'reached', ARGV[4])
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'RETRYCOUNT', 1, 'JUSTID')
end
