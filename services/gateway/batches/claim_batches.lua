-- Claim batches that nobody works on, oldest first. A lease that its holder does not renew expires.
-- KEYS: batches that have not ended
-- ARGV: prefix of batches, gateway, ms of a lease, most to claim, batches that the gateway works on...
-- Returns those that it has claimed.
local held, claimed = {}, {}
for i = 5, #ARGV do held[ARGV[i]] = true end
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local lease = ARGV[1] .. id .. ':lease'
  if #claimed >= tonumber(ARGV[4]) then break end
  if redis.call('EXISTS', ARGV[1] .. id) == 0 then
    redis.call('ZREM', KEYS[1], id)
  elseif not held[id] and
    (redis.call('SET', lease, ARGV[2], 'NX', 'PX', ARGV[3]) or redis.call('GET', lease) == ARGV[2]) then
    claimed[#claimed + 1] = id
  end
end
return claimed
