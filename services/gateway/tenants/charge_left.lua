-- Charge what has been generated for requests whose clients left and may come back, and free the places of those that
-- have ended.
-- KEYS: hash of such requests: "name id" -> "tokens of its answer that are charged:limit a minute, or 0"
-- ARGV: prefixes of records, of journals and of tenants' hashes
-- Returns (name, tokens)... that are charged now.
-- requires: tenant_hash
local charged_now = {}
ensure_hash(KEYS[1])
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  local name, id = string.match(field, '^(%S*) (%S+)$')
  local charged, limit = string.match(redis.call('HGET', KEYS[1], field), '^(%d+):(%d+)$')
  local runs = false
  if id and charged then
    local key, record, journal = ARGV[3] .. name, ARGV[1] .. id, ARGV[2] .. id
    local open = key .. ':open'
    ensure_hash(key)
    ensure_hash(open)
    charged, limit = tonumber(charged), tonumber(limit)
    local there = redis.call('TYPE', record).ok == 'hash'
    if there and redis.call('TYPE', journal).ok == 'string' then
      local more = math.floor(redis.call('STRLEN', journal) / 4) - charged
      if more > 0 then
        charged = charged + more
        begin(key, open, id)
        if limit > 0 then raise_level(key, 'tokens', limit, more) end
        redis.call('HINCRBY', key, 'used:generated', more)
        charged_now[#charged_now + 1], charged_now[#charged_now + 2] = name, more
      end
    end
    runs = there and redis.call('HEXISTS', record, 'finish') == 0
    if runs then
      redis.call('HSET', KEYS[1], field, string.format('%d:%d', charged, limit))
    else
      forget(key, open, id)
    end
  end
  if not runs then redis.call('HDEL', KEYS[1], field) end
end
return charged_now
