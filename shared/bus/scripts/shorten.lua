-- Let an answer expire earlier: now if it has ended, else when its finish is written.
-- KEYS: record, journal, logprobs
-- ARGV: expiry in ms
-- requires: typed
if not is_a('hash', KEYS[1]) then return end
redis.call('HSET', KEYS[1], 'shortened', ARGV[1])
if redis.call('HEXISTS', KEYS[1], 'finish') == 0 then return end
for _, key in ipairs(KEYS) do
  local rest = redis.call('PTTL', key)
  if rest < 0 or rest > tonumber(ARGV[1]) then redis.call('PEXPIRE', key, ARGV[1]) end
end
